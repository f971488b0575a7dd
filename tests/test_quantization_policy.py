"""Five spellings, one policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatterbox_vllm.arguments import policy_of
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.policy import COMPONENTS, KEPT, STRATEGIES, VOCODER, Policy
from chatterbox_vllm.quantization.spellings import SWITCHES, Given, resolve


def resolved(**spellings: Any) -> Policy:
    return resolve({name: Given(value, name) for name, value in spellings.items()})


@pytest.mark.parametrize(
    ("spellings", "t3", "estimator", "voice_encoder"),
    [
        ({}, "none", "none", "none"),
        ({"quantization": None}, "none", "none", "none"),
        ({"quantization": "bitsandbytes"}, "bnb-4bit", "none", "none"),
        ({"quantization": "gptq"}, "gptq", "none", "none"),
        ({"use_bnb_quantization": True}, "bnb-8bit", "none", "none"),
        ({"use_bnb_quantization": False}, "none", "none", "none"),
        ({"use_quantization": True}, "bnb-4bit", "none", "none"),
        ({"use_quantization": True, "quantization_method": "awq"}, "awq", "none", "none"),
        (
            {"use_quantization": True, "quantization_method": "bnb-8bit", "quantize_s3gen": True},
            "bnb-8bit",
            "bnb-8bit",
            "none",
        ),
        ({"quantization_method": "awq", "quantize_s3gen": True}, "awq", "bnb-4bit", "none"),
        ({"quantize_s3gen": True, "quantize_voice_encoder": True}, "none", "bnb-4bit", "bnb-4bit"),
        ({"quantize_s3gen": True, "quantization": "int8"}, "int8", "int8", "none"),
        ({"quantize_s3gen": True, "use_bnb_quantization": True}, "bnb-8bit", "bnb-8bit", "none"),
        ({"quantize_s3gen": True, "use_int8_quantization": True}, "int8", "int8", "none"),
        ({"quantize_voice_encoder": True, "use_int8_quantization": True}, "int8", "int8", "int8"),
        ({"quantize_s3gen": True, "quantization_strategy": "mixed"}, "bnb-4bit", "bnb-8bit", "none"),
        ({"quantize_voice_encoder": True, "quantization_strategy": "conservative"}, "int8", "int8", "int8"),
        ({"quantize_voice_encoder": True, "quantization_strategy": "aggressive"}, "bnb-4bit", "bnb-4bit", "bnb-4bit"),
        ({"quantize_s3gen": True, "quantization": "fp8"}, "fp8", "bnb-4bit", "none"),
        ({"quantization": "BNB-8bit"}, "bnb-8bit", "none", "none"),
        ({"quantization": "GPTQ"}, "GPTQ", "none", "none"),
        ({"quantization_strategy": "mixed"}, "bnb-4bit", "bnb-8bit", "none"),
        ({"quantization_strategy": "mixed", "quantization": "bitsandbytes"}, "bnb-4bit", "bnb-8bit", "none"),
        ({"use_int8_quantization": True}, "int8", "int8", "none"),
        ({"use_int8_quantization": False, "quantization": "fp8"}, "fp8", "none", "none"),
        (
            {"use_quantization": True, "quantize_s3gen": False, "quantize_voice_encoder": False},
            "bnb-4bit",
            "none",
            "none",
        ),
        ({"quantization_strategy": "mixed", "quantize_voice_encoder": False}, "bnb-4bit", "bnb-8bit", "none"),
        ({"quantization_strategy": "none", "quantize_s3gen": False}, "none", "none", "none"),
    ],
)
def test_every_spelling(spellings: dict[str, Any], t3: str, estimator: str, voice_encoder: str) -> None:
    policy = resolved(**spellings)
    assert (policy.t3, policy.flow_encoder, policy.estimator, policy.voice_encoder) == (
        t3,
        estimator,
        estimator,
        voice_encoder,
    )
    assert policy.is_quantized == (t3 != "none" or estimator != "none")


@pytest.mark.parametrize(
    ("spellings", "told"),
    [
        ({"use_bnb_quantization": True, "quantization": "bitsandbytes"}, "quantization=bitsandbytes and use_bnb_"),
        ({"use_quantization": False, "quantization_strategy": "mixed"}, "use_quantization=false and quantization_str"),
        ({"use_int8_quantization": True, "quantization_strategy": "mixed"}, "use_int8_quantization=true and quant"),
        (
            {"use_quantization": False, "quantize_s3gen": True},
            "use_quantization=false and quantize_s3gen=true disagree",
        ),
        (
            {"quantization_strategy": "none", "quantize_s3gen": True},
            "quantize_s3gen=true and quantization_strategy=none",
        ),
        (
            {"quantization_strategy": "aggressive", "quantize_s3gen": False},
            "quantize_s3gen=false and quantization_strategy=aggressive disagree about flow_encoder; keep one",
        ),
        (
            {"use_int8_quantization": True, "quantize_s3gen": False},
            "quantize_s3gen=false and use_int8_quantization=true disagree about flow_encoder; keep one",
        ),
        *(
            (
                {"quantization_strategy": "auto", name: value},
                f"{name}={str(value).lower()} and quantization_strategy=auto disagree: auto decides about everything",
            )
            for name, value in (
                ("use_int8_quantization", True),
                ("use_quantization", False),
                ("use_bnb_quantization", True),
                ("quantize_s3gen", True),
                ("quantization", "bnb-4bit"),
                ("estimator_quantization", "bnb-8bit"),
            )
        ),
        ({"quantization": None, "use_quantization": True}, "quantization=none and use_quantization=true disagree"),
        ({"quantization_strategy": "bold"}, "quantization_strategy=bold is no strategy; there are none, conservative"),
        ({"estimator_quantization": "awq"}, "estimator cannot be awq; it can be bnb-4bit, bnb-8bit, int8, none"),
        ({"quantization": 4}, "quantization must be one of none, bnb-4bit"),
        ({"quantization_method": "awq"}, "quantization_method=awq has no effect without use_quantization"),
    ],
)
def test_contradictions_and_nonsense_are_named(spellings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved(**spellings)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("name", sorted(SWITCHES))
@pytest.mark.parametrize("value", ["false", "true", 0, 1])
def test_a_switch_in_python_is_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} must be True, False or None, not {value!r}$") as caught:
        policy_of(None, {name: value})
    assert caught.value.param == name
    assert policy_of(None, {name: False}) == policy_of(None, {name: None}) == Policy()
    assert policy_of(None, {name: True}).is_quantized


@pytest.mark.parametrize("value", [5, {"t3": "int8"}, b"mine.toml"])
def test_a_profile_is_a_path(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="quantization_profile must be the path of a TOML or JSON") as caught:
        policy_of(None, {"quantization_profile": value})
    assert caught.value.param == "quantization_profile"


def test_a_profile_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('t3 = "bitsandbytes"\nestimator = "bnb-8bit"\n')
    policy = resolved(quantization_profile=file)
    assert policy == Policy("bnb-4bit", "none", "bnb-8bit", "none")
    for strategy in ("auto", "mixed"):  # a file's name is not the name of a strategy
        (tmp_path / f"{strategy}.toml").write_text('t3 = "int8"')
        assert resolved(quantization_profile=tmp_path / f"{strategy}.toml") == Policy("int8")
    (tmp_path / "mine.json").write_text('{"t3": "fp8"}')
    assert Policy.from_file(tmp_path / "mine.json").t3 == "fp8"
    for content, told in (
        ("hift = 'bnb-4bit'", "hift is no component; there are t3"),
        ("t3 =", "is no quantisation profile"),
        ("t3 = 4", "t3 must be one of"),
        ("", "names no component; write"),
        ("estimator = 'fp8'", r"mine.toml: estimator cannot be fp8; it can be"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigurationError, match=told) as refused:
            Policy.from_file(file)
        assert "mine.toml" in str(refused.value)
    (tmp_path / "mine.JSON").write_text('\ufeff{"t3": "fp8"}', encoding="utf-8")
    assert Policy.from_file(tmp_path / "mine.JSON").t3 == "fp8"
    for content in ('{"t3": "fp8", "t3": "int8"}', "[" * 100_000):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"mine.json is no quantisation profile"):
            Policy.from_file(tmp_path / "mine.json")
    with pytest.raises(ConfigurationError, match="is no quantisation profile"):
        Policy.from_file(tmp_path / "absent.toml")


def test_auto_has_no_methods() -> None:
    with pytest.raises(ConfigurationError, match="auto decides about every component; give no methods"):
        Policy("int8", strategy="auto")


def test_a_strategy_falls_back_step_by_step() -> None:
    names = []
    policy: Policy | None = STRATEGIES["aggressive"]
    while policy is not None:
        names.append(policy.strategy)
        policy = policy.weaker()
    assert names == ["aggressive", "mixed", "conservative", "none"]
    assert resolved(quantization="bnb-4bit").weaker() is None, "who names a method wants that one"


def test_a_cpu_has_int8_in_place_of_a_strategy_s_methods(caplog: pytest.LogCaptureFixture) -> None:
    assert STRATEGIES["aggressive"].on_cpu().methods == dict.fromkeys(COMPONENTS, "int8")
    assert "needs an NVIDIA GPU; on a CPU t3, flow_encoder, estimator, voice_encoder will be int8" in caplog.text
    beside = STRATEGIES["mixed"].on_cpu(VOCODER)
    assert beside.methods == {**STRATEGIES["mixed"].methods, "flow_encoder": "int8", "estimator": "int8"}
    assert resolved(use_bnb_quantization=True).on_cpu(VOCODER).t3 == "bnb-8bit"
    assert resolved(use_int8_quantization=True).on_cpu().t3 == "int8"
    with pytest.raises(ConfigurationError, match=r"bnb-8bit \(t3\) needs an NVIDIA GPU"):
        resolved(use_bnb_quantization=True).on_cpu()


def test_one_word_for_a_policy() -> None:
    assert resolved().method == "none"
    assert resolved(use_int8_quantization=True).method == "int8"
    assert resolved(quantization_strategy="mixed").method == "mixed"


def test_what_is_kept_has_a_reason() -> None:
    assert {"embeddings", "speech head", "hift", "f0 predictor", "norms and biases"} <= set(KEPT)
    assert all(reason for reason in KEPT.values())
