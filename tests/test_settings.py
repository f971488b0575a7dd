"""Settings: which source wins, what is refused and how that reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

import config
from chatterbox_vllm import sources as module
from chatterbox_vllm.api.app import engine_arguments
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.policy import STRATEGIES
from chatterbox_vllm.settings import PRESETS, Settings, example, variables
from chatterbox_vllm.sources import load
from chatterbox_vllm.types import SpeechOptions

ROOT = Path(__file__).parent.parent


def loaded(
    flags: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    env_file: Path | None = None,
    deployment: dict[str, Any] | None = None,
) -> Settings:
    return load(flags, environment=environment or {}, env_file=env_file, deployment=deployment)


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_nvidia_gpu", lambda: True)


def test_defaults_are_upstream_s_and_local() -> None:
    settings = loaded()
    assert settings.options == SpeechOptions()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "english")
    assert settings.quantization is None


SOURCES = ["default", "preset", "config.py", ".env", "environment", "flag"]


@pytest.mark.parametrize("highest", range(len(SOURCES)), ids=SOURCES)
def test_the_highest_source_wins(env_file: Path, highest: int) -> None:
    env_file.write_text("CHATTERBOX_MAX_BATCH_SIZE=13\n" if highest >= 3 else "")
    settings = loaded(
        flags={"max_batch_size": "15"} if highest >= 5 else {},
        environment={"CHATTERBOX_MAX_BATCH_SIZE": "14"} if highest >= 4 else {},
        env_file=env_file,
        deployment={"max_batch_size": 12 if highest >= 2 else None, "preset": "medium-vram" if highest >= 1 else None},
    )
    expected = [None, PRESETS["medium-vram"]["max_batch_size"], 12, 13, 14, 15]
    assert settings.max_batch_size == expected[highest]


def test_a_preset_sets_only_defaults() -> None:
    settings = loaded({"preset": "low-vram"}, {"CHATTERBOX_MAX_MODEL_LEN": "900"})
    assert (settings.max_batch_size, settings.max_model_len) == (PRESETS["low-vram"]["max_batch_size"], 900)


def test_a_preset_of_the_environment_counts_like_a_flag() -> None:
    assert loaded(environment={"CHATTERBOX_PRESET": "high-vram"}).max_batch_size == 32
    assert loaded({"preset": "low-vram"}, {"CHATTERBOX_PRESET": "high-vram"}).max_batch_size == 2


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.usefixtures("gpu")
def test_every_preset_is_valid(name: str) -> None:
    settings = loaded({"preset": name})
    for field, value in PRESETS[name].items():
        assert getattr(settings, field) == value


def test_ultra_low_vram_quantises_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_nvidia_gpu", lambda: False)
    assert not loaded({"preset": "ultra-low-vram"}).policy.is_quantized
    monkeypatch.setattr(module, "_has_nvidia_gpu", lambda: True)
    assert loaded({"preset": "ultra-low-vram"}).policy == STRATEGIES["aggressive"]
    assert not loaded({"preset": "ultra-low-vram", "device": "cpu"}).policy.is_quantized


@pytest.mark.parametrize(
    ("environment", "t3", "estimator"),
    [
        ({"CHATTERBOX_QUANTIZATION": "none"}, "none", "bnb-4bit"),
        ({"CHATTERBOX_QUANTIZATION": "bnb-8bit"}, "bnb-8bit", "bnb-4bit"),
        ({"CHATTERBOX_QUANTIZATION": "fp8"}, "fp8", "bnb-4bit"),
        ({"CHATTERBOX_USE_QUANTIZATION": "false"}, "none", "none"),
        ({"CHATTERBOX_USE_QUANTIZATION": "1", "CHATTERBOX_QUANTIZATION_METHOD": "bnb-8bit"}, "bnb-8bit", "bnb-4bit"),
        ({"CHATTERBOX_USE_QUANTIZATION": "no", "CHATTERBOX_QUANTIZATION_METHOD": "awq"}, "none", "none"),
        ({"CHATTERBOX_USE_QUANTIZATION": "true", "CHATTERBOX_QUANTIZATION": "bitsandbytes"}, "bnb-4bit", "bnb-4bit"),
        ({"CHATTERBOX_QUANTIZE_S3GEN": "true", "CHATTERBOX_QUANTIZATION": "bnb-8bit"}, "bnb-8bit", "bnb-8bit"),
        ({"CHATTERBOX_QUANTIZATION_STRATEGY": "none"}, "none", "none"),
        ({"CHATTERBOX_QUANTIZATION_STRATEGY": "auto"}, "none", "none"),
        ({"CHATTERBOX_ESTIMATOR_QUANTIZATION": "none"}, "bnb-4bit", "none"),
        ({"USE_INT8_QUANTIZATION": "true"}, "int8", "int8"),
        ({"CHATTERBOX_USE_BNB_QUANTIZATION": "true"}, "bnb-8bit", "bnb-4bit"),
        ({"CHATTERBOX_QUANTIZE_S3GEN": "false"}, "bnb-4bit", "none"),
        ({"CHATTERBOX_QUANTIZATION_METHOD": "bnb-8bit"}, "bnb-8bit", "bnb-4bit"),
        (
            {"CHATTERBOX_QUANTIZATION_METHOD": "bnb-8bit", "CHATTERBOX_QUANTIZE_S3GEN": "false"},
            "bnb-8bit",
            "none",
        ),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_spellings_of_quantisation(environment: dict[str, str], t3: str, estimator: str) -> None:
    """An explicit one also beats the preset's, component by component."""
    policy = loaded({"preset": "ultra-low-vram"}, environment).policy
    assert (policy.t3, policy.estimator) == (t3, estimator)


def test_a_budget_in_config_py_may_be_a_number_of_bytes() -> None:
    assert loaded(deployment={"vram_budget": 2**31}) == loaded(environment={"CHATTERBOX_VRAM_BUDGET": str(2**31)})
    for wrong in (True, 2.5, "bogus"):
        with pytest.raises(ConfigurationError, match=r"^config\.py: vram_budget=.*: must be an amount of memory: 2GiB"):
            loaded(deployment={"vram_budget": wrong})


def test_a_higher_source_decides_about_quantisation() -> None:
    deployment = {"quantization": "bitsandbytes"}
    assert loaded(environment={"CHATTERBOX_USE_QUANTIZATION": "false"}, deployment=deployment).policy.t3 == "none"
    assert loaded({"use_quantization": False}, {"CHATTERBOX_QUANTIZATION": "fp8"}).policy.t3 == "none"
    assert loaded({"use_quantization": True}, {"CHATTERBOX_QUANTIZATION_METHOD": "bnb-8bit"}).policy.t3 == "bnb-8bit"
    beside = loaded({"quantize_s3gen": True}, {"CHATTERBOX_QUANTIZATION": "bnb-8bit"}).policy
    assert (beside.t3, beside.estimator) == ("bnb-8bit", "bnb-8bit")
    assert loaded({"quantization_strategy": "auto"}, {"CHATTERBOX_QUANTIZATION": "fp8"}).policy.strategy == "auto"


def test_the_constructor_knows_the_spellings() -> None:
    """Not only ``load``, which says component by component what they mean."""
    assert Settings(quantization_strategy="mixed").policy == STRATEGIES["mixed"]
    assert Settings(quantization_strategy="auto").policy.strategy == "auto"
    assert Settings(use_bnb_quantization=True).policy.t3 == "bnb-8bit"
    assert Settings(use_int8_quantization=True).policy.estimator == "int8"
    assert not Settings().policy.is_quantized
    with pytest.raises(ConfigurationError, match="disagree about t3"):
        _ = Settings(use_bnb_quantization=True, use_int8_quantization=True).policy


def test_a_strategy_may_have_capitals() -> None:
    """As a method may."""
    assert loaded({"quantization_strategy": "Mixed"}).policy == STRATEGIES["mixed"]
    auto = loaded(environment={"CHATTERBOX_QUANTIZATION_STRATEGY": "AUTO"}, deployment={"quantization": "int8"})
    assert (auto.quantization_strategy, auto.policy.strategy) == ("auto", "auto")


@pytest.mark.parametrize(
    ("said", "methods", "strategy"),
    [
        ({"use_int8_quantization": "true"}, "int8 int8 int8 none", None),
        ({"use_bnb_quantization": "true"}, "bnb-8bit bnb-8bit bnb-8bit none", None),
        ({"quantization_strategy": "conservative"}, "int8 int8 int8 none", "conservative"),
        ({"quantization_strategy": "mixed"}, "bnb-4bit bnb-8bit bnb-8bit none", "mixed"),
        ({"preset": "low-vram"}, "bnb-4bit bnb-8bit bnb-8bit none", "mixed"),
        ({"preset": "low-vram", "quantization": "awq"}, "awq bnb-8bit bnb-8bit none", None),
        ({"preset": "low-vram", "use_int8_quantization": "true"}, "int8 int8 int8 none", None),
        ({"preset": "low-vram", "quantize_s3gen": "false"}, "bnb-4bit bnb-4bit bnb-4bit none", None),
        ({"quantization": "int8", "estimator_quantization": "bnb-8bit"}, "int8 int8 bnb-8bit none", None),
        ({"quantization": "fp8"}, "fp8 bnb-4bit bnb-4bit none", None),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_switch_for_a_part_goes_by_what_another_source_says(
    said: dict[str, str], methods: str, strategy: str | None
) -> None:
    environment = {f"CHATTERBOX_{name.upper()}": value for name, value in said.items()}
    policy = loaded({"quantize_s3gen": True}, environment).policy
    assert (" ".join(policy.methods.values()), policy.strategy) == (methods, strategy)
    assert loaded(environment={"CHATTERBOX_QUANTIZE_S3GEN": "true"}, deployment=said).policy == policy


@pytest.mark.parametrize(
    ("flags", "environment", "methods"),
    [
        ({"quantize_voice_encoder": True}, {"QUANTIZATION_STRATEGY": "conservative"}, "int8 int8 int8 int8"),
        ({"quantization": "int8", "quantize_s3gen": True}, {"PRESET": "low-vram"}, "int8 int8 int8 none"),
        ({"use_bnb_quantization": True}, {"QUANTIZE_S3GEN": "true"}, "bnb-8bit bnb-8bit bnb-8bit none"),
        (
            {"quantization": "bnb-8bit"},
            {"USE_BNB_QUANTIZATION": "true", "QUANTIZE_S3GEN": "true"},
            "bnb-8bit bnb-8bit bnb-8bit none",
        ),
        (
            {"quantization": "bnb-4bit"},
            {"USE_BNB_QUANTIZATION": "true", "QUANTIZE_S3GEN": "true"},
            "bnb-4bit bnb-4bit bnb-4bit none",
        ),
        ({"quantization_strategy": "none"}, {"QUANTIZE_S3GEN": "true"}, "none none none none"),
        (
            {"quantization": "none"},
            {"USE_INT8_QUANTIZATION": "1", "QUANTIZE_VOICE_ENCODER": "1"},
            "none int8 int8 int8",
        ),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_part_has_t3_s_method_whichever_source_names_it(
    flags: dict[str, Any], environment: dict[str, str], methods: str
) -> None:
    policy = loaded(flags, {f"CHATTERBOX_{name}": value for name, value in environment.items()}).policy
    assert " ".join(policy.methods.values()) == methods


@pytest.mark.parametrize("flags", [{"quantization": "int8"}, {"use_quantization": False}, {"quantize_s3gen": True}])
def test_what_is_said_over_auto_counts(flags: dict[str, Any]) -> None:
    auto = {"CHATTERBOX_QUANTIZATION_STRATEGY": "auto"}
    assert loaded(flags, auto).policy == loaded(flags, auto, deployment={"quantization": "fp8"}).policy
    assert loaded(flags, auto).policy == loaded(flags).policy


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"quantize_s3gen": False}, "--quantize-s3gen=false"),
        ({"voice_encoder_quantization": "none", "use_int8_quantization": False}, "--voice-encoder-quantization=none"),
        ({"use_bnb_quantization": "false"}, "--use-bnb-quantization=false"),
        ({"quantization": "none"}, "--quantization=none"),
    ],
)
def test_sparing_a_part_does_not_switch_auto_off(flags: dict[str, Any], told: str) -> None:
    expected = f"^{told} and CHATTERBOX_QUANTIZATION_STRATEGY=auto disagree: auto decides about everything; keep one$"
    with pytest.raises(ConfigurationError, match=expected):
        loaded(flags, {"CHATTERBOX_QUANTIZATION_STRATEGY": "auto"}, deployment={"estimator_quantization": "int8"})
    below = loaded(deployment=flags, environment={"CHATTERBOX_QUANTIZATION_STRATEGY": "auto"}).policy
    assert below.strategy == "auto"
    auto = {"CHATTERBOX_QUANTIZATION_STRATEGY": "auto"}
    assert loaded(flags | {"quantization_strategy": "none"}, auto).policy == STRATEGIES["none"]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"CHATTERBOX_PORT": "99999"}, "CHATTERBOX_PORT=99999: must be an integer from 0 to 65535"),
        ({"PORT": "http"}, "PORT=http: must be an integer from 0 to 65535"),
        (
            {"CHATTERBOX_GPU_MEMORY_UTILIZATION": "0"},
            "CHATTERBOX_GPU_MEMORY_UTILIZATION=0: must be a number from 0.01 to 1",
        ),
        ({"CHATTERBOX_TEMPERATURE": "nan"}, "CHATTERBOX_TEMPERATURE=nan: must be a number from 0 to 2"),
        ({"CHATTERBOX_TEMPERATURE": "inf"}, "CHATTERBOX_TEMPERATURE=inf: must be a number from 0 to 2"),
        ({"CHATTERBOX_CFG_SCALE": "lots"}, "CHATTERBOX_CFG_SCALE=lots: must be a number from 0 to 10"),
        ({"CHATTERBOX_DEBUG": "perhaps"}, "CHATTERBOX_DEBUG=perhaps: must be true or false"),
        ({"CHATTERBOX_USE_QUANTIZATION": "maybe"}, "CHATTERBOX_USE_QUANTIZATION=maybe: must be true or false"),
        ({"CHATTERBOX_LOG_LEVEL": "loud"}, "CHATTERBOX_LOG_LEVEL=loud: must be one of debug, info, warning, error"),
        (
            {"CHATTERBOX_PRESET": "tiny"},
            "CHATTERBOX_PRESET=tiny: must be one of ultra-low-vram, low-vram, medium-vram, high-vram",
        ),
        ({"CHATTERBOX_ENGINE_ARGS": "{"}, "CHATTERBOX_ENGINE_ARGS={: must be a JSON object"),
        ({"CHATTERBOX_ENGINE_ARGS": "[1]"}, "CHATTERBOX_ENGINE_ARGS=[1]: must be a JSON object"),
        ({"CHATTERBOX_LANGUAGE": "english"}, "CHATTERBOX_LANGUAGE=english: must be two small letters, as en"),
        (
            {"CHATTERBOX_QUANTIZATION": "bnb 4bit"},
            "CHATTERBOX_QUANTIZATION=bnb 4bit: must be a name of letters, digits, _ and -",
        ),
        (
            {"CHATTERBOX_ESTIMATOR_QUANTIZATION": "awq"},
            "CHATTERBOX_ESTIMATOR_QUANTIZATION: estimator cannot be awq; it can be bnb-4bit, bnb-8bit, int8, none",
        ),
        (
            {"CHATTERBOX_FIRST_CHUNK_TOKENS": "300"},
            "CHATTERBOX_FIRST_CHUNK_TOKENS: first_chunk_tokens=300 is more than largest_chunk_tokens=240; lower the",
        ),
        (
            {"CHATTERBOX_LARGEST_CHUNK_TOKENS": "20"},
            "CHATTERBOX_LARGEST_CHUNK_TOKENS: first_chunk_tokens=26 is more than largest_chunk_tokens=20; lower the",
        ),
        (
            {"CHATTERBOX_CFG_SCALE": "0.3", "CHATTERBOX_CFG_WEIGHT": "0.4"},
            "CHATTERBOX_CFG_WEIGHT=0.4 and CHATTERBOX_CFG_SCALE=0.3 mean the same setting and disagree; keep one",
        ),
        (
            {"CHATTERBOX_QUANTIZATION": "fp8", "CHATTERBOX_USE_QUANTIZATION": "true"},
            "CHATTERBOX_QUANTIZATION=fp8 and CHATTERBOX_USE_QUANTIZATION=true disagree about t3; keep one",
        ),
        (
            {"CHATTERBOX_QUANTIZATION_STRATEGY": "mixed", "CHATTERBOX_USE_BNB_QUANTIZATION": "true"},
            "CHATTERBOX_USE_BNB_QUANTIZATION=true and CHATTERBOX_QUANTIZATION_STRATEGY=mixed disagree about t3; keep",
        ),
        (
            {"CHATTERBOX_USE_QUANTIZATION": "false", "CHATTERBOX_QUANTIZE_S3GEN": "true"},
            "CHATTERBOX_USE_QUANTIZATION=false and CHATTERBOX_QUANTIZE_S3GEN=true disagree about flow_encoder; keep",
        ),
        (
            {"CHATTERBOX_QUANTIZATION": "bitsandbytes", "USE_INT8_QUANTIZATION": "true"},
            "CHATTERBOX_QUANTIZATION=bitsandbytes and USE_INT8_QUANTIZATION=true disagree about t3; keep one",
        ),
        ({"CHATTERBOX_QUANTIZATION_STRATEGY": "brave"}, "CHATTERBOX_QUANTIZATION_STRATEGY=brave is no strategy; there"),
        (
            {"CHATTERBOX_QUANTIZATION_METHOD": "bnb-4bit"},
            "CHATTERBOX_QUANTIZATION_METHOD=bnb-4bit has no effect without use_quantization; set both or none",
        ),
    ],
)
def test_a_wrong_variable_is_one_readable_line(environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded(environment=environment)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert caught.value.param in environment


def test_errors_name_their_source(env_file: Path) -> None:
    env_file.write_text("CHATTERBOX_PORT=-1")
    with pytest.raises(ConfigurationError, match=r"^.*\.env: CHATTERBOX_PORT=-1: must be"):
        loaded(env_file=env_file)
    with pytest.raises(ConfigurationError, match=r"^--max-batch-size=0: must be an integer from 1 to 4096$"):
        loaded({"max_batch_size": "0"})
    with pytest.raises(ConfigurationError, match=r"^config\.py: top_p=2: must be"):
        loaded(deployment={"top_p": 2})
    with pytest.raises(ConfigurationError, match=r"config\.py: prot"):
        loaded(deployment={"prot": 80})
    with pytest.raises(ConfigurationError, match=r"^config\.py: preset=\['a'\]: must be one of ultra-low-vram"):
        loaded(deployment={"preset": ["a"]})
    with pytest.raises(ConfigurationError, match=r"^--host=: must be text, not empty$"):
        loaded({"host": ""})


@pytest.mark.parametrize(
    "line",
    [
        "CHATTERBOX_API_KEY='s3cret",
        'CHATTERBOX_API_KEY="s3cret',
        "CHATTERBOX_API_KEY: s3cret",
        "CHATTERBOX_API_KEY:s3cret",
        "CHATTERBOX_API_KEY s3cret",
        "export CHATTERBOX_API_KEY",
    ],
)
def test_a_line_of_the_file_that_says_nothing_is_refused_and_not_shown(env_file: Path, line: str) -> None:
    env_file.write_text(f"# ours\n\nCHATTERBOX_PORT=1\n\n{line}\nCHATTERBOX_DEBUG=true\n")
    with pytest.raises(ConfigurationError) as caught:
        loaded(env_file=env_file)
    assert str(caught.value).startswith(f"{env_file}, line 5: is not NAME=value, or a quote in it has no end; ")
    assert "s3cret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(env_file: Path) -> None:
    env_file.write_bytes("CHATTERBOX_API_KEY=clé".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"\.env is not in UTF-8"):
        loaded(env_file=env_file)
    env_file.unlink()
    env_file.mkdir()
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read \(Is a directory\)"):
        loaded(env_file=env_file)


def test_what_a_file_may_look_like(env_file: Path) -> None:
    lines = [
        "\ufeffCHATTERBOX_API_KEY='s3 $cret # all of it'  # a comment",
        "",
        "export CHATTERBOX_PORT = 1",
        'CHATTERBOX_MODEL="a folder"',
        "CHATTERBOX_DEBUG=true # said twice",
        "CHATTERBOX_DEBUG=",
        "CHATTERBOX_VOICES_DIR=$HOME/voices",
        "SOMEBODY_ELSE_S",
    ]
    env_file.write_bytes("\r\n".join(lines).encode())
    settings = loaded(env_file=env_file)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "s3 $cret # all of it"
    assert (settings.port, settings.model, settings.debug) == (1, "a folder", False)
    assert settings.voices_dir == Path("$HOME/voices")


def test_two_wrong_values_are_two_lines() -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded(environment={"CHATTERBOX_PORT": "x", "CHATTERBOX_MIN_P": "2"})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("environment", "name", "value"),
    [
        ({"CHATTERBOX_CFG_SCALE": "0.3"}, "cfg_weight", 0.3),
        ({"PORT": "4123"}, "port", 4123),
        ({"PORT": "4123", "CHATTERBOX_PORT": "9000"}, "port", 9000),
        ({"MAX_CHUNK_LENGTH": "280"}, "max_chunk_length", 280),
        ({"MODEL_DTYPE": "float16"}, "dtype", "float16"),
        ({"CHATTERBOX_ENGINE_ARGS": '{"seed": 3}'}, "engine_args", {"seed": 3}),
        ({"CHATTERBOX_VOICES_DIR": "voices"}, "voices_dir", Path("voices")),
        ({"CHATTERBOX_WATERMARK": "off"}, "watermark", False),
        ({"CHATTERBOX_PORT": ""}, "port", 8000),
        ({"CHATTERBOX_API_KEY": "  "}, "api_key", None),
    ],
)
def test_variables(environment: dict[str, str], name: str, value: Any) -> None:
    assert getattr(loaded(environment=environment), name) == value


def test_every_promised_variable_exists() -> None:
    promised = (
        "MODEL MAX_BATCH_SIZE MAX_MODEL_LEN USE_QUANTIZATION QUANTIZATION_METHOD QUANTIZE_S3GEN QUANTIZE_VOICE_ENCODER "
        "DEBUG GPU_MEMORY_UTILIZATION HOST PORT CFG_SCALE"
    )
    known = {key for name in Settings.model_fields for key in variables(name)}
    assert {f"CHATTERBOX_{name}" for name in promised.split()} <= known


def test_an_unknown_variable_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(environment={"CHATTERBOX_PROT": "1", "CHATTERBOX_CACHE_DIR": "/x", "OTHER": "1"})
    assert [record.getMessage() for record in caplog.records] == [
        "CHATTERBOX_PROT is not a setting of this server and has no effect"
    ]


def test_a_variable_that_counts_in_the_environment_only(env_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    env_file.write_text("CHATTERBOX_CACHE_DIR=/x\n")
    with caplog.at_level(logging.WARNING):
        loaded(env_file=env_file)
    (record,) = caplog.records
    assert record.getMessage() == f"{env_file}: CHATTERBOX_CACHE_DIR has no effect in a file; set it in the environment"


def test_the_key_is_never_shown(env_file: Path) -> None:
    env_file.write_text("CHATTERBOX_API_KEY=s3$cret")
    settings = loaded(env_file=env_file)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "s3$cret"
    assert "$cret" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    with pytest.raises(ConfigurationError) as caught:
        loaded(deployment={"api_key": ["s3cret"]})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "variant", "resolved"),
    [
        (None, None, ("english", None)),
        (None, "multilingual", ("multilingual", None)),
        ("english", "multilingual-v3", ("multilingual-v3", None)),
        ("demo", None, ("demo", None)),
        ("demo", "multilingual", ("demo", "multilingual")),
        ("demo-multilingual", "english", ("demo", "english")),
        ("/a/folder", "multilingual", ("/a/folder", "multilingual")),
    ],
)
def test_a_variant_decides_between_named_models(model: str | None, variant: str | None, resolved: Any) -> None:
    assert loaded({"variant": variant}, {"CHATTERBOX_MODEL": model} if model else {}).checkpoint == resolved


def test_settings_alone_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_PORT", "1")
    assert Settings().port == 8000
    assert load(env_file=None).port == 1


def test_the_example_is_what_the_settings_say() -> None:
    """When this fails: python -m chatterbox_vllm.settings > .env.example"""
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == example()


def test_the_example_uncommented_is_the_defaults(env_file: Path) -> None:
    env_file.write_text("\n".join(line[1:] for line in example().splitlines() if line.startswith("#CHATTERBOX_")))
    assert loaded(env_file=env_file) == loaded()


def test_the_container_s_example_is_an_environment(caplog: pytest.LogCaptureFixture) -> None:
    environment = {key: value or "" for key, value in dotenv_values(ROOT / ".env.example.docker").items()}
    with caplog.at_level(logging.WARNING):
        assert loaded(environment=environment).host == "0.0.0.0"
    assert caplog.text == ""
    kept = ("HF_HOME", "CHATTERBOX_CACHE_DIR", "CHATTERBOX_VOICES_DIR")
    assert all(environment[name].startswith("/data/") for name in kept)


def test_config_py_has_the_promised_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.BNB_QUANTIZATION is None
    assert (config.USE_BNB_QUANTIZATION, config.TEMPERATURE, config.TOP_P) == (False, 0.8, 1.0)
    monkeypatch.setattr(config, "TEMPERATURE", 0.6)
    monkeypatch.setattr(config, "OTHER", {"port": 4123})
    monkeypatch.setattr(config, "BNB_QUANTIZATION", "bitsandbytes")
    settings = config.settings()
    assert (settings.temperature, settings.port, settings.quantization) == (0.6, 4123, "bnb-4bit")
    monkeypatch.setenv("CHATTERBOX_TEMPERATURE", "0.7")
    assert config.settings().temperature == 0.7
    assert config.settings({"temperature": "0.9"}).temperature == 0.9


def test_settings_become_the_engine_s_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatterbox_vllm.api.app._schedule", lambda settings: settings.first_chunk_tokens)
    settings = loaded(
        {
            "model": "demo",
            "variant": "multilingual",
            "engine_args": '{"seed": 4}',
            "dtype": "float16",
            "watermark": "no",
        }
    )
    arguments = engine_arguments(settings)
    assert (arguments["model"], arguments["variant"]) == ("demo", "multilingual")
    assert (arguments["seed"], arguments["dtype"], arguments["watermark"]) == (4, "float16", False)
    assert (arguments["device"], arguments["schedule"]) == (None, 26)
    with pytest.raises(ConfigurationError, match="engine_args: quantization has a setting of its own"):
        engine_arguments(loaded({"engine_args": '{"quantization": "fp8"}'}))
