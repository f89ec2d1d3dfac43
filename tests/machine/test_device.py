"""Choice of device and precision."""

import pytest
import torch
from conftest import train_section

from gpt.errors import UserError
from gpt.machine import device
from gpt.machine.device import choose_device, choose_dtype, describe
from gpt.machine.rates import shortest_duration


def test_a_device_that_is_not_there_is_an_environment_error_that_names_those_that_are():
    with pytest.raises(UserError, match=r"device=cuda:63 is not available \(this machine has .*cpu\)") as caught:
        choose_device("cuda:63")
    assert caught.value.code == 5


def test_auto_takes_a_device_that_exists():
    torch.ones(1, device=choose_device("auto"))


def test_tf32_is_refused_where_there_is_no_such_arithmetic():
    with pytest.raises(UserError, match="tf32") as caught:
        choose_dtype("tf32", torch.device("cpu"))
    assert caught.value.code == 5


def test_auto_computes_in_bfloat16_only_where_the_processor_does_and_is_faster_so(monkeypatch):
    monkeypatch.delenv("GPT_LAB_AUTO_DTYPE", raising=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    cpu = torch.device("cpu")

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1024, 1024, dtype=dtype)
        return shortest_duration(lambda: matrix @ matrix, cpu)

    is_faster = native and seconds(torch.bfloat16) < seconds(torch.float32)
    assert choose_dtype("auto", cpu) == (torch.bfloat16 if is_faster else torch.float32)
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16  # slow perhaps, but what was asked for


def test_an_environment_variable_says_what_auto_means_and_changes_nothing_that_was_asked_for(monkeypatch):
    cpu = torch.device("cpu")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        monkeypatch.setenv("GPT_LAB_AUTO_DTYPE", name)
        assert choose_dtype("auto", cpu) == dtype and choose_dtype("float16", cpu) == torch.float16
    for name in ("fp8", ""):
        monkeypatch.setenv("GPT_LAB_AUTO_DTYPE", name)
        with pytest.raises(UserError, match=f"GPT_LAB_AUTO_DTYPE={name}; set it to one of float32, bfloat16"):
            choose_dtype("auto", cpu)


def test_the_description_names_device_and_precision():
    number = torch.get_num_threads()
    threads = f"{number} thread" if number == 1 else f"{number} threads"
    assert describe(torch.device("cpu"), {"dtype": "float32"}) == f"cpu ({threads}), float32"


def test_a_resumed_run_takes_auto_to_mean_what_it_meant_before_and_says_what_is_not_as_before(caplog):
    threads = torch.get_num_threads()
    try:
        _, _, first = device.choose("auto", train_section(dtype="auto"), {})
        assert first["threads"] == threads and first["torch"] == torch.__version__ and first["world_size"] == 1
        recorded = first | {"dtype": "bfloat16", "threads": threads + 1, "torch": "2.0.0", "device": "cpu"}
        where, dtype, now = device.choose("auto", train_section(dtype="auto"), recorded)
        assert (where.type, dtype) == ("cpu", torch.bfloat16)
        assert torch.get_num_threads() == now["threads"] == threads + 1
        assert f"not as before: torch 2.0.0 != {torch.__version__}; the run goes on" in caplog.text
    finally:
        torch.set_num_threads(threads)


def test_what_was_recorded_but_is_not_there_is_announced_and_what_is_asked_for_wins(caplog):
    _, _, first = device.choose("cpu", train_section(), {})
    where, dtype, _ = device.choose("auto", train_section(), first | {"device": "cuda:63", "dtype": "bfloat16"})
    assert str(where) != "cuda:63" and dtype == torch.float32
    assert "device cuda:63 !=" in caplog.text and "dtype bfloat16 != float32" in caplog.text


@pytest.mark.parametrize("nonsense", [{"dtype": "load"}, {"dtype": 7, "threads": -1}, {"threads": "x", "device": []}])
def test_a_record_of_nonsense_changes_nothing(nonsense):
    threads = torch.get_num_threads()
    where, dtype, now = device.choose("cpu", train_section(dtype="auto"), nonsense)
    assert where.type == "cpu" and isinstance(dtype, torch.dtype) and now["threads"] == threads


RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_each_rank_has_its_part_of_the_cores_and_a_run_that_had_another_number_of_ranks_says_so(monkeypatch, lines):
    before = torch.get_num_threads()
    _, _, alone = device.choose("cpu", train_section(), {}, 3)
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    where, _, now = device.choose("auto" if not torch.cuda.is_available() else "cpu", train_section(), alone)
    torch.set_num_threads(before)
    assert (where.type, now["world_size"], now["threads"]) == ("cpu", 2, 4)
    assert "threads 3 != 4, world_size 1 != 2" in lines()[-1]


def test_no_rank_computes_on_the_gpu_of_another(monkeypatch):
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="device=cuda:0 cannot be that of 2 ranks; use device=auto") as caught:
        device.choose("cuda:0", train_section(), {})
    assert caught.value.code == 2


def test_running_out_of_memory_names_the_settings_to_change():
    expected = r"out of memory.*train.micro_batch, model.context_length"
    with pytest.raises(UserError, match=expected) as caught, device.memory_errors():
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.code == 5
    with pytest.raises(RuntimeError, match="shape"), device.memory_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
