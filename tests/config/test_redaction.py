"""URLs with secrets are rejected as settings, and secrets are redacted from written files."""

import dataclasses
import json

import pytest

from mmsr1_jax.config import redaction
from mmsr1_jax.config.settings import Config, ConfigError, validate
from mmsr1_jax.training import run_config

SECRETS = (
    "http://user:hunter2@host/v1", "https://hunter2@host", "redis://:hunter2@h:6379/0",
    "redis://:hun/ter2@h", "HTTP://U:hunter2@H", "//user:hunter2@host", "user:hunter2@host:80",
    "http://h/?api_key=hunter2", "http://h/?apiKey=hunter2", "http://h?x=1&key=hunter2",
    "http://h/a?X-Amz-Signature=hunter2", "http://h/put/{name}?sv=1&sig=hunter2",
    "http://h/#access_token=hunter2", "http://h/?api%5Fkey=hunter2", "http://h/?APIKEY=hunter2",
    "http://h/?subscription-key=hunter2", "http://h/?client_secret=hunter2&next=1",
    "http://h/?a=1;token=hunter2", "http://[::1]:80/?auth=hunter2", "http://h/?code=hunter2",
    "http://h?x=1#key=hunter2", "http://h/?accessToken=hunter2", "http://h/?user.password=hunter2",
    "https://proxy/https://u:hunter2@h/", "https://proxy//u:hunter2@h", "http://h?u=//u:hunter2@h/",
    "https://proxy/http://a/http://u:hun/ter2@h", "https://proxy/?url=https://u:hun&ter2@h/",
    "https://proxy/?url=https%3A%2F%2Fh%2F%3Fapi_key%3Dhunter2", "https%3A%2F%2Fu:hunter2%40h",
    "https://proxy/?url=https%253A%252F%252Fh%252F%253Fapi_key%253Dhunter2",
    "https://proxy/https%3A%2F%2Fu%3Ahunter2%40h%2F", "https://proxy/?u=https://h/?api_key=hunter2",
    "localhost:8000/?api_key=hunter2", "v1?token=hunter2", "h/v1;token=hunter2", "h#sid=hunter2",
    "https://h/;api_key=hunter2", "https://h/a;v=1;api_key=hunter2/b?page=2", "h/?key[a]=hunter2",
    "https://h/?appid=hunter2", "https://h/?key[]=hunter2", "https://h/?key%5B0%5D=hunter2",
    "https://h/?user[password]=hunter2", "https://h/?AWSAccessKeyId=hunter2", "h?otp=hunter2",
    "https://h/?passcode=hunter2", "https://h/?hmac=hunter2", "h?sessionId=hunter2",
    "https://h/?key=a?hunter2", "https://h/?key=a&hunter2",
)  # fmt: skip
PLAIN = (
    "http://127.0.0.1:8001", "http://[::1]:80/v1?next=1", "http://h/?q=key", "searches.sqlite",
    "http://h/?keyword=a&monkey=2&sidebar=1&design=3", "redis://h:6379/0", "http://h:80/a@b",
    "http://h/put/{name}", "judge=5/4", "127.0.0.1:80", "http://h/?token=", "Qwen/Qwen3-32B",
    "build/a@b/c", "http://h/user:me@there", "('a.parquet',)",
    "docs?page=2", "a=b;c=d", "data/*.parquet", "data/part-?.parquet", "data/?/key=5/a.parquet",
    "C:\\models\\me@work\\x", "C:/models/me@work/x", "C:\\a@b;v=2", "me@host.org?subject=x",
    "Qwen/Qwen3-32B@main", "https://h/?q=a%20b&url=https%3A%2F%2Fh%2Fa%40b", "100%/a%20b.parquet",
    "https://web/2020/https://h:80/a@b", "https://h//@scope/name", "localhost:8000/v1?page=2",
    "https://h/a;v=1;type=b?keyword[]=2", "https://h/?monkeys[]=2&keyboard=3&hotpot=4&app=5",
    "data/key=5/part.parquet", "https://h/#/key=5", "gs://bucket/a@b/c", "file:///C:/a@b",
)  # fmt: skip


@pytest.mark.parametrize("address", SECRETS)
def test_settings_with_a_secret_are_rejected_without_showing_it(address):
    config = Config()
    for part, field, variable in (
        ("services", "judge_url", "JUDGE_API_KEY"), ("services", "cache", "CACHE_PASSWORD"),
        ("services", "upload_url", "UPLOAD_AUTHORIZATION"), ("services", "searxng_url", ""),
        ("tools", "index", ""), ("run", "model", ""),
    ):  # fmt: skip
        if field == "cache" and address.startswith(("redis:", "rediss:")):
            continue  # see the next test
        changed = dataclasses.replace(getattr(config, part), **{field: address})
        with pytest.raises(ConfigError) as error:
            validate(dataclasses.replace(config, **{part: changed}))
        message = str(error.value)
        assert message.startswith(f"config.{part}.{field}: ") and variable in message
        assert "hunter2" not in message and "ter2" not in message and "\n" not in message
    hosts = dataclasses.replace(config.services, allowed_hosts=("a", address))
    with pytest.raises(ConfigError, match=r"^config\.services\.allowed_hosts: "):
        validate(dataclasses.replace(config, services=hosts))


def test_redis_password_is_accepted_and_not_written(tmp_path):
    config = Config()
    config.services.cache = "redis://:hunter2@127.0.0.1:6379/0"
    run_config.write(tmp_path / "config.json", validate(config), "m")
    assert "hunter2" not in (tmp_path / "config.json").read_text()
    saved, _ = run_config.read(tmp_path / "config.json")
    assert (
        saved.services.cache == "redis://127.0.0.1:6379/0"
    )  # the password is read from CACHE_PASSWORD


@pytest.mark.parametrize("address", PLAIN)
def test_plain_settings_are_unchanged(address):
    assert redaction.find_secret(address) is None and redaction.redact(address) == address
    services = dataclasses.replace(Config().services, summariser_url=address)
    validate(dataclasses.replace(Config(), services=services))


@pytest.mark.parametrize("address", SECRETS)
def test_written_settings_contain_no_secret(tmp_path, address):
    """Even of settings that were never checked."""
    services = dataclasses.replace(Config().services, judge_url=address, allowed_hosts=(address,))
    config = dataclasses.replace(Config(), services=services)
    run_config.write(tmp_path / "config.json", config, f"see {address} there")
    text = (tmp_path / "config.json").read_text()
    assert "ter2" not in text and "***" in json.loads(text)["config"]["services"]["judge_url"]
    assert json.loads(text)["model"].endswith(" there")
    once = redaction.redact(address)
    assert redaction.redact(once) == once
