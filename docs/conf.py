"""Sphinx configuration: pages in Markdown (MyST), and the settings page from the dataclasses."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmsr1_jax.scripts.settings import all_settings  # noqa: E402

project = "mmsr1_jax"
copyright = "the mmsr1_jax authors"
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "mmsr1_jax"
exclude_patterns = ["_build"]


def write_settings(app) -> None:
    """Write `settings.md`, one table for each part of the config."""
    lines = [
        "# Settings",
        "",
        "Generated from `mmsr1_jax/config/`; `mmsr1 settings` prints the same.",
    ]
    part = ""
    for setting in all_settings():
        if setting.name.split(".")[1] != part:
            part = setting.name.split(".")[1]
            lines += [
                "",
                f"## config.{part}",
                "",
                "| setting | default | allowed | meaning |",
                "|---|---|---|---|",
            ]
        name = f"`{setting.name.removeprefix('config.')}`<br>{setting.type}"
        cells = (name, f"`{setting.default!r}`", setting.allowed, setting.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    pathlib.Path(app.srcdir, "settings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app) -> None:
    app.connect("builder-inited", write_settings)
