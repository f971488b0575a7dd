"""Two things at once on a CPU: the same sound, whatever torch's threads."""

from __future__ import annotations

import threading

import pytest
import torch

from chatterbox_vllm.vocoder import teams
from tests.vocoder_support import speech, upstream_whole, vocoder, voice, whole

CPU = torch.device("cpu")


@pytest.fixture
def threads(monkeypatch):
    # vLLM's CPU worker, which other tests run in this process, leaves a function there that does nothing.
    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_mel_and_samples_are_upstreams_with_any_number_of_threads(threads, count):
    threads(count)
    tokens, of = speech(60), voice(25)
    expected_mel, expected = upstream_whole(tokens, of, seed=5)
    mel, samples = whole(vocoder(), tokens, of, seed=5)
    assert (mel - expected_mel).abs().max() <= 1e-4
    assert (samples - expected).abs().max() <= 1e-4


def test_padded_rows_are_halved_with_their_masks(threads):
    own, tokens = vocoder(), torch.zeros(2, 30, dtype=torch.int64)
    mask = torch.arange(60) < torch.tensor([[60], [40]])
    noise, speaker, cond = torch.randn(2, 60, 80), torch.randn(2, 80), torch.randn(2, 60, 80)
    mels = []
    for count in (1, 2):
        threads(count)
        with torch.inference_mode():
            mels.append(own.networks.flow.solve(noise, own.networks.flow.mu(tokens, None), speaker, cond, mask, 2))
    assert (mels[1] - mels[0])[mask].abs().max() <= 1e-5


def test_works_run_side_by_side_and_answer_in_order(threads):
    threads(2)
    met = threading.Barrier(2)
    works = [lambda: met.wait(10) * 0 + 1, lambda: met.wait(10) * 0 + 2, lambda: 3]
    assert teams.together(works, CPU) == [1, 2, 3]


def test_a_team_has_half_of_the_threads(threads):
    threads(5)
    seen = teams.together([lambda: (torch.get_num_threads(), teams.threads(), teams.can_share(CPU))] * 2, CPU)
    assert seen == [(2, 5, False)] * 2
    late = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), late) == (5, [5])


def test_one_thread_makes_no_teams(threads):
    threads(1)
    assert teams.together([threading.current_thread] * 2, CPU) == [threading.current_thread()] * 2


@pytest.mark.parametrize("inference", [True, False])
def test_teams_are_in_the_callers_mode(threads, inference):
    threads(2)
    with torch.inference_mode(inference):
        assert teams.together([torch.is_inference_mode_enabled] * 2, CPU) == [inference] * 2


def test_an_error_waits_for_the_other_team(threads):
    threads(2)
    begun, ended = threading.Event(), threading.Event()

    def fail():
        begun.wait(10)
        raise torch.OutOfMemoryError("no memory")

    def succeed():
        begun.set()
        ended.set()

    with pytest.raises(torch.OutOfMemoryError):
        teams.together([fail, succeed], CPU)
    assert ended.is_set()
