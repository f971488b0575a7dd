"""The memory budget: its arithmetic, what it chooses, and what it says when nothing fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from vllm import AsyncEngineArgs

from chatterbox_vllm.budget import Plan, choose_strategy, compare, plan
from chatterbox_vllm.checkpoint import Checkpoint, resolve
from chatterbox_vllm.convert import quantize
from chatterbox_vllm.costs import (
    BLOCK,
    MIB,
    T3_GRAPH_BYTES,
    Demand,
    cache_bytes,
    context_bytes,
    longest_frames,
    position_bytes,
)
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.memory import parse_bytes
from chatterbox_vllm.quantization.policy import STRATEGIES, Policy
from chatterbox_vllm.settings import PRESETS
from chatterbox_vllm.t3.folder import infer_config, model_folder
from chatterbox_vllm.t3.launch import cache_bytes_per_position, engine_arguments
from chatterbox_vllm.types import MAX_MODEL_LEN
from chatterbox_vllm.vocoder.stage import FEWEST_FRAMES
from tests.memory_support import GUIDE, Headers, full_headers, guide_row

AUTO = Policy(strategy="auto")


@pytest.fixture(scope="module")
def demand(tmp_path_factory: pytest.TempPathFactory) -> Demand:
    """Of networks of the real sizes."""
    return Demand(full_headers(tmp_path_factory.mktemp("full")), max_batch_size=2, max_model_len=640)


def least(demand: Demand, policy: Policy = STRATEGIES["none"]) -> int:
    """Bytes below which ``demand`` does not fit, as the refusal says them."""
    with pytest.raises(ConfigurationError) as refused:
        plan(1, demand, policy)
    missing = re.search(r"is ([\d,]+) bytes", str(refused.value))
    assert missing
    return int(missing[1].replace(",", "")) + 1


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("2GiB", 2**31),
        ("2048MiB", 2**31),
        ("2g", 2**31),
        ("2147483648", 2**31),
        (2**31, 2**31),
        ("2GB", 2 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("4096m", 2**32),
    ],
)
def test_ways_to_write_an_amount(text: str | int, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "0GiB", "2 TiB", "2GiB!", "GiB", "9" * 320, True, 0])
def test_what_is_no_amount_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigurationError, match="2GiB") as refused:
        parse_bytes(text)
    assert refused.value.param == "vram_budget"
    assert "vram_budget" in str(refused.value)


def test_the_cache_is_what_vllm_will_take(demand: Demand) -> None:
    config, sizes = infer_config(demand.checkpoint.t3), demand.estimator.t3_sizes
    one = cache_bytes_per_position(config, 2)
    assert position_bytes(sizes) == one
    assert sizes.vocabulary == config.vocab_size
    made = plan(2**34, demand)
    blocks, rest = divmod(made.t3_arguments["kv_cache_memory_bytes"], BLOCK * one)
    assert rest == 0
    assert blocks == 2 * (640 // BLOCK) + 1  # vLLM keeps one for itself
    assert cache_bytes(sizes, 641, 1) - cache_bytes(sizes, 640, 1) == BLOCK * one


def test_a_quantised_checkpoint_has_the_cache_of_its_source(demo: Checkpoint, tmp_path: Path) -> None:
    """The scales and zero points beside a matrix are no layers of their own."""
    quantize(demo, tmp_path / "awq", texts=["Hello there."], tokens=4)
    ours = Demand(resolve(tmp_path / "awq"), max_batch_size=2, max_model_len=640)
    source = replace(ours, checkpoint=demo)
    assert ours.estimator.t3_sizes == source.estimator.t3_sizes
    plans = [plan(2**33, each) for each in (ours, source)]
    assert plans[0].t3_arguments["kv_cache_memory_bytes"] == plans[1].t3_arguments["kv_cache_memory_bytes"]
    assert len({item.bytes for each in plans for item in each.items if "T3's cache" in item.name}) == 1


def test_a_plan_is_one_that_the_engine_takes(demand: Demand, demo: Checkpoint, tmp_path: Path) -> None:
    made, config = plan(2**34, demand), infer_config(demo.t3)
    arguments = engine_arguments(config, made.t3_arguments)
    engine = AsyncEngineArgs(model=str(model_folder(demo.t3, config, tmp_path)), **arguments)
    assert (engine.max_num_seqs, engine.max_model_len, engine.block_size) == (2, 640, BLOCK)
    assert max(made.t3_arguments["cudagraph_capture_sizes"]) == 2
    assert made.vocoder_max_frames is not None
    assert made.vocoder_max_frames >= longest_frames(640)


def test_items_sum_to_the_total(demand: Demand) -> None:
    made = plan(2**34, demand, STRATEGIES["mixed"])
    estimated = demand.estimator.estimate(STRATEGIES["mixed"])
    assert made.total == sum(item.bytes for item in made.items) <= made.budget
    exact = sum(item.bytes for item in made.items if item.exact)
    assert exact == estimated.card + made.t3_arguments["kv_cache_memory_bytes"]
    for item in made.items:
        assert item.name in made.table()


def test_more_memory_is_never_worse(demand: Demand) -> None:
    """From just enough to plenty, in steps of 256 MiB: what was had before stays."""
    before = plan(least(demand), demand)
    for amount in range(before.budget, 2**33, 256 * MIB):
        made = plan(amount, demand)
        assert made.total <= amount
        assert value(made) >= value(before)
        before = made
    assert before.vocoder_process
    assert before.enrolment_device == "cuda"


def test_an_open_batch_size_is_what_fits(demand: Demand) -> None:
    open_batch = replace(demand, max_batch_size=None)
    assert plan(least(open_batch), open_batch).max_batch_size == 1
    sizes = [plan(gigabytes * 2**30, open_batch).max_batch_size for gigabytes in (4, 8, 16, 128)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 256


def value(made: Plan) -> tuple[int, int, bool, bool]:
    """What memory is spent on, in its order."""
    tokens = made.t3_arguments["max_num_batched_tokens"]
    return made.vocoder_max_frames or 0, tokens, made.vocoder_process, made.enrolment_device == "cuda"


@pytest.mark.parametrize(
    ("batch", "captured"),
    [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (300, [2**power for power in range(9)])],
)
def test_the_least_of_t3(demand: Demand, batch: int, captured: list[int]) -> None:
    """Only decoding is captured, for batches that double and the largest; a step holds a token of each request."""
    demand = replace(demand, max_batch_size=batch)
    arguments = plan(least(demand), demand).t3_arguments
    assert (arguments["max_num_seqs"], arguments["max_model_len"]) == (batch, 640)
    assert arguments["max_num_batched_tokens"] >= max(256, batch)
    assert arguments["compilation_config"] == {"cudagraph_mode": "FULL_DECODE_ONLY"}
    assert arguments["cudagraph_capture_sizes"] == sorted({*captured, batch})


def test_steps_that_read_prompts_have_graphs_where_there_is_room(demand: Demand) -> None:
    """On a card that can have them; as large as a step, and counted."""
    demand = replace(demand, max_batch_size=8)
    without, with_graphs = (plan(2**34, replace(demand, step_graphs=each)) for each in (False, True))
    assert without.t3_arguments["compilation_config"] == {"cudagraph_mode": "FULL_DECODE_ONLY"}
    assert with_graphs.t3_arguments["compilation_config"] == {"cudagraph_mode": "FULL"}
    sizes = with_graphs.t3_arguments["cudagraph_capture_sizes"]
    assert max(sizes) == with_graphs.t3_arguments["max_num_batched_tokens"] == 1024
    decoding = {1, 2, 4, 8}
    (graphs,) = [item for item in with_graphs.items if item.name.startswith("T3's graphs")]
    assert graphs.name == f"T3's graphs, {len(sizes) + len(decoding)} of them"
    assert with_graphs.total - without.total == len(sizes) * T3_GRAPH_BYTES


def test_without_room_for_graphs_of_prompts_it_goes_without(demand: Demand) -> None:
    demand = replace(demand, step_graphs=True)
    made = plan(least(demand), demand)
    assert made.t3_arguments["compilation_config"] == {"cudagraph_mode": "FULL_DECODE_ONLY"}
    assert made.total == plan(least(demand), replace(demand, step_graphs=False)).total


def test_just_enough_is_enough(demand: Demand) -> None:
    enough = least(demand)
    assert plan(enough, demand).total == enough
    with pytest.raises(ConfigurationError):
        plan(enough - 1, demand)


def test_a_refusal_names_the_missing_bytes_and_what_would_fit(demand: Demand) -> None:
    demand = replace(demand, max_batch_size=512, max_model_len=2048)
    available = least(replace(demand, max_batch_size=100))
    with pytest.raises(ConfigurationError) as refused:
        plan(available, demand)
    text = str(refused.value)
    assert refused.value.param == "vram_budget"
    assert f"{least(demand) - available:,} bytes" in text
    assert "T3's cache, 512 x 2048 positions" in text
    assert "max_batch_size=100" in text.split("what would fit:")[1]
    shorter = re.search(r"max_model_len=(\d+)", text.split("what would fit:")[1])
    larger = re.search(r"vram_budget=(\d+MiB)", text.split("what would fit:")[1])
    assert shorter
    assert larger
    plan(available, replace(demand, max_model_len=int(shorter[1])))
    with pytest.raises(ConfigurationError):
        plan(available, replace(demand, max_model_len=int(shorter[1]) + BLOCK))
    plan(parse_bytes(larger[1]), demand)


def remedies(refused: pytest.ExceptionInfo[ConfigurationError]) -> list[str]:
    return [line.strip() for line in str(refused.value).split("what would fit:\n")[1].splitlines()]


def test_what_no_single_change_mends_three_do(demand: Demand) -> None:
    """A card of 2 GiB, and nothing else said."""
    defaults = Demand(demand.checkpoint)
    with pytest.raises(ConfigurationError) as refused:
        plan(2**31, defaults)
    together, larger = remedies(refused)
    found = re.fullmatch(r"max_batch_size=1, quantization_strategy=aggressive, max_model_len=(\d+)", together)
    assert found
    assert larger.startswith("vram_budget=")
    length = int(found[1])
    plan(2**31, replace(defaults, max_batch_size=1, max_model_len=length), STRATEGIES["aggressive"])
    with pytest.raises(ConfigurationError):
        plan(2**31, replace(defaults, max_batch_size=1, max_model_len=length + BLOCK), STRATEGIES["aggressive"])
    with pytest.raises(ConfigurationError) as refused:
        plan(2**28, defaults)
    assert len(remedies(refused)) == 1


def test_no_longer_utterance_is_offered_than_the_engine_speaks(demand: Demand) -> None:
    endless = replace(demand, max_batch_size=64, max_model_len=99_999)
    with pytest.raises(ConfigurationError) as refused:
        plan(2**37, endless)
    (shorter,) = re.findall(r"max_model_len=(\d+)", "".join(remedies(refused)))
    assert MAX_MODEL_LEN - BLOCK < int(shorter) <= MAX_MODEL_LEN


def test_a_refusal_knows_how_the_checkpoint_is_stored(demo: Checkpoint, tmp_path: Path) -> None:
    """Its T3 can have no other method: what would need one is not offered."""
    quantize(demo, tmp_path / "stored", method="bnb-8bit")
    stored = Demand(resolve(tmp_path / "stored"), max_batch_size=64)
    for asked in (Policy(), STRATEGIES["none"]):
        with pytest.raises(ConfigurationError, match="and quantisation bnb-8bit; nothing") as refused:
            plan(least(stored, asked) - 1, stored, asked)
        assert "quantization_strategy" not in "".join(remedies(refused))
    assert plan(2**34, stored, AUTO).policy.strategy == "none"


def test_auto_quantises_no_more_than_it_must(demand: Demand) -> None:
    amounts = {name: least(demand, policy) for name, policy in STRATEGIES.items()}
    assert sorted(amounts.values(), reverse=True) == list(amounts.values())
    for name, amount in amounts.items():
        assert plan(amount, demand, AUTO).policy.strategy == name
        assert choose_strategy(amount, demand).strategy == name
    with pytest.raises(ConfigurationError, match="quantisation auto"):
        plan(amounts["aggressive"] - 1, demand, AUTO)


def test_auto_without_a_budget_needs_no_room_for_a_large_batch(demand: Demand) -> None:
    many, eight = replace(demand, max_batch_size=4096), replace(demand, max_batch_size=8)
    assert choose_strategy(least(eight), many).strategy == "none"
    assert choose_strategy(least(eight), replace(demand, max_batch_size=None)).strategy == "none"


def test_auto_without_a_budget_takes_what_room_there_is(demand: Demand) -> None:
    """Eight utterances are a wish; where none fits, it speaks of what is free."""
    demand = replace(demand, max_batch_size=8)
    for batch in (4, 2, 1):
        few = replace(demand, max_batch_size=batch)
        assert choose_strategy(least(few, STRATEGIES["aggressive"]), demand).strategy == "aggressive"
    free = least(replace(demand, max_batch_size=1), STRATEGIES["aggressive"]) - 1
    with pytest.raises(ConfigurationError, match=r"auto goes by the \S+ of the card that are free") as told:
        choose_strategy(free, demand)
    assert told.value.param == "quantization_strategy"


def test_compare_tells_what_fits_and_why_the_rest_does_not(demand: Demand) -> None:
    plans = compare(least(demand, STRATEGIES["mixed"]), demand)
    assert [isinstance(each, Plan) for each in plans.values()] == [False, False, True, True]


def test_contexts_are_counted(demand: Demand) -> None:
    """T3's, the vocoder's if it has a process of its own, and the server's if it enrols on the card."""

    def contexts(changed: Demand, amount: int) -> str:
        return plan(amount, changed).items[0].name

    own, guest = replace(demand, vocoder_process=True), replace(demand, vocoder_process=False)
    assert contexts(demand, 2**34) == contexts(own, 2**34) == "CUDA contexts, 3"
    assert contexts(guest, 2**34) == "CUDA contexts, 2"
    assert contexts(demand, least(demand)) == "CUDA contexts, 1"
    assert contexts(own, least(own)) == "CUDA contexts, 2"
    fewer = replace(own, multiprocessors=28)
    assert least(own) - least(fewer) == 2 * (context_bytes(132) - context_bytes(28))


# On one H200, CUDA 13.0, driver 580: docs/VRAM_OPTIMIZATION.md.


def test_a_context_is_as_measured() -> None:
    assert context_bytes(132) == pytest.approx(618.8 * MIB, rel=0.01)


def test_the_ultra_low_preset_takes_what_was_measured(demand: Demand) -> None:
    """By NVML, the whole device; two of cuBLAS' workspaces were 24 MiB larger then."""
    made = plan(2**31, replace(demand, max_batch_size=1), STRATEGIES["aggressive"])
    assert made.total == pytest.approx((2072.8 - 2 * 24) * MIB, rel=0.05)
    assert in_torch(made) == pytest.approx((1208 - 2 * 24) * MIB, rel=0.05)


def test_eight_at_once_take_what_was_measured(demand: Demand) -> None:
    """T3 and the vocoder, each in its process; nothing had been enrolled."""
    made = plan(2**33, replace(demand, max_batch_size=8, max_model_len=1000))
    assert (made.vocoder_process, made.vocoder_max_frames, made.enrolment_device) == (True, 8192, "cpu")
    assert made.total == pytest.approx(6848.4 * MIB, rel=0.05)
    assert in_torch(made) == pytest.approx((3084 + 2242) * MIB, rel=0.05)


def in_torch(made: Plan) -> int:
    """Bytes, and those of the solver's CUDA graphs."""
    outside = ("CUDA contexts", "libraries and kernels")
    return sum(item.bytes for item in made.items if not item.name.startswith(outside))


def test_a_vocoder_elsewhere_costs_nothing(demand: Demand) -> None:
    elsewhere = plan(2**34, replace(demand, vocoder_on_card=False))
    assert elsewhere.vocoder_max_frames is None
    assert elsewhere.vocoder_process is None
    assert plan(2**34, replace(demand, vocoder_on_card=False, vocoder_process=True)).vocoder_process
    assert not any("vocoder" in item.name for item in elsewhere.items)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_own_budgets(demand: Demand, name: str) -> None:
    preset = PRESETS[name]
    chosen = replace(demand, max_batch_size=preset["max_batch_size"], max_model_len=preset["max_model_len"])
    policy = STRATEGIES[preset.get("quantization_strategy", "none")]
    made = plan(parse_bytes(preset["vram_budget"]), chosen, policy)
    assert made.vocoder_max_frames is not None
    if name == "ultra-low-vram":
        assert preset["max_model_len"] >= 600
        assert not made.vocoder_process
        contexts = next(item.bytes for item in made.items if "contexts" in item.name)
        assert made.total - contexts <= 3 * 2**29
    else:
        assert made.vocoder_max_frames >= FEWEST_FRAMES


def test_a_process_less_is_a_remedy(demand: Demand) -> None:
    own = replace(demand, vocoder_process=True)
    with pytest.raises(ConfigurationError, match="vocoder_process=false"):
        plan(least(demand), own)


def test_the_guide_in_the_docs_is_computed(demand: Demand) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "VRAM_OPTIMIZATION.md").read_text(encoding="utf-8")
    assert isinstance(demand.checkpoint, Headers)
    for multiprocessors, gigabytes in GUIDE:
        assert guide_row(demand.checkpoint, multiprocessors, gigabytes) in text, "run: python -m tests.memory_support"
    weights = text.split("## Weights by strategy")[1].split("\n## ")[0]
    for name, estimated in demand.estimator.compare_strategies().items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", weights, flags=re.MULTILINE)
        assert f"| {estimated.at('t3') / MIB:,.1f} |" in row
        assert f"| {estimated.at('vocoder') / MIB:,.1f} |" in row
