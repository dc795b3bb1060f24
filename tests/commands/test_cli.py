"""The program `mmsr1`: its commands, config files by name, and the list of settings."""

import os
import subprocess
import sys

import pytest

from mmsr1_jax import cli
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.scripts import settings
from tests.programs import ROOT


def run(*arguments, cwd=ROOT):
    program = "from mmsr1_jax import cli; cli.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_help_lists_every_command_with_its_summary():
    done = run("--help")
    assert done.returncode == 0
    for name in (*cli.COMMANDS, *cli.SCRIPTS):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3
    files = {path.stem for path in (ROOT / "mmsr1_jax" / "scripts").glob("[a-z]*.py")}
    assert files == set(cli.SCRIPTS)


def test_an_unknown_command_is_an_error_in_one_line():
    done = run("fly")
    assert done.returncode == 2 and done.stderr.startswith("error: mmsr1 has no command 'fly'")
    assert len(done.stderr.splitlines()) == 1


def test_a_command_gets_its_arguments(tmp_path):
    done = run("reward", "--episodes=none.jsonl", "--out=out.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "none.jsonl" in done.stderr


@pytest.mark.parametrize("name", ["tiny", "qwen7b:script"])
def test_a_config_is_resolved_by_name_in_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stem, colon, variant = name.partition(":")
    assert cli.config_file(name) == f"{ROOT / 'configs' / stem}.py{colon}{variant}"


@pytest.mark.parametrize("name", ["configs/tiny.py", "mine.py", "no_such", "../tiny"])
def test_other_names_are_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.config_file(name) == name


def test_every_setting_has_a_meaning():
    entries = list(settings.all_settings())
    assert len(entries) > 100 and len({entry.name for entry in entries}) == len(entries)
    assert [entry.name for entry in entries if not entry.meaning] == []


def test_every_number_shows_its_bounds():
    for entry in settings.all_settings():
        if entry.type in ("int", "float"):
            assert entry.allowed, entry.name


def test_settings_are_printed_by_prefix(capsys):
    settings.main(["settings", "config.run.group"])
    assert capsys.readouterr().out.startswith("config.run.group_size: int = 8  [>= 1, <= 65,536]\n")
    with pytest.raises(UserError, match="no setting begins with config.nothing"):
        settings.main(["settings", "nothing"])


def test_settings_import_no_jax():
    code = "import sys, mmsr1_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.proof
def test_an_installed_package_runs_from_another_directory(tmp_path):
    """Needs the package index for setuptools; other dependencies are those of this environment."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, ROOT], check=True)
    site_packages = [path for path in sys.path if path.endswith("site-packages")]
    (next(venv.glob("lib/python*/site-packages")) / "tests.pth").write_text(
        "\n".join(site_packages)
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    mmsr1 = venv / "bin" / "mmsr1"
    for arguments in (["--help"], ["settings"], ["tiny_world", "--out=world", "--sft_examples=0"],
                      ["train", "--config=tiny", "--workdir=run", "--config.run.steps=1",
                       "--config.run.prompts_per_step=2", "--config.run.group_size=2",
                       "--config.data.train=('world/train.parquet',)",
                       "--config.tools.index=world/index"]):  # fmt: skip
        done = subprocess.run(
            [mmsr1, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
