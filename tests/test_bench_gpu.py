"""bench_gpu's logic, without a GPU: what it prints, and what it calls wrong; its times are none."""

import time
import types

import bench_gpu
import cupy_stand_in
import numpy as np
import pytest
import test_cupy_path
import torch

import kernels_cuda
import phi3_ref

kernels = test_cupy_path.kernels  # the stand-in in CuPy's place, checked functions in the kernels'
SIZES = dict(vocabulary_size=96, num_layers=2, hidden_dim=64, intermediate_dim=80,
             num_query_heads=4, num_key_value_heads=4, layer_norm_epsilon=1e-5)


class Event:
    """An event of a stream that does at once what it is asked to."""

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time


@pytest.fixture(autouse=True)
def bench(monkeypatch, kernels):
    """Put the stand-in in CuPy's place, and the CPU in PyTorch's GPU's; nothing has failed."""
    def standard_normal(shape, dtype):
        return cupy_stand_in.ndarray(rng.normal(size=shape).astype(dtype))

    def to_torch(array):
        return torch.from_numpy(array.get().view(np.int16)).view(torch.bfloat16)

    rng, parts = np.random.default_rng(0), dict(vars(cupy_stand_in))
    parts["cuda"] = types.SimpleNamespace(
        **vars(cupy_stand_in.cuda), Event=Event,
        get_elapsed_time=lambda first, last: 1e3 * (last.time - first.time))
    parts["random"] = types.SimpleNamespace(standard_normal=standard_normal)
    parts["get_default_memory_pool"] = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    monkeypatch.setattr(bench_gpu, "cupy", types.SimpleNamespace(**parts))
    monkeypatch.setattr(bench_gpu, "to_torch", to_torch)
    monkeypatch.setattr(bench_gpu, "has_torch", lambda: True)
    monkeypatch.setattr(bench_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(bench_gpu, "failures", [])
    monkeypatch.setattr(bench_gpu, "SECONDS", [0.0, 0.0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which is fastest for arrays so small
    yield
    torch.set_num_threads(threads)


def rows(capsys):
    """The cells of each printed row."""
    return [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in capsys.readouterr().out.splitlines()]


@pytest.mark.filterwarnings("ignore:bfloat16 weights have 8 bits")
def test_a_training_step_beside_transformers(capsys, kernels):
    """Both compute the loss and gradients of NumPy's float32, and each part has its time."""
    bench_gpu.bench_training(1e12, 1e15, S=70, sizes=SIZES)
    table = rows(capsys)
    assert not bench_gpu.failures
    assert [row[0].split(",")[0] for row in table] == [
        f"training {part}" for part in ("step", "forward", "backward", "AdamW")]
    for row in table:  # the backward's time is a difference, here of two that say nothing
        for rate in (row[2], row[3], row[5].removeprefix("transformers, flash: ").split(" ")[0]):
            assert float(rate) > 0 or row[0].startswith("training backward")
    assert {"transposed_matmul", "adam_step", "silu_backward", "attention_backward",
            "token_embedding_backward"} <= {*kernels}


@pytest.mark.parametrize("name", [
    "silu_backward", "token_embedding_backward", "transposed_matmul", "attention_backward"])
def test_a_wrong_gradient_is_called_wrong(name, capsys, monkeypatch):
    """A kernel that is off by a factor is not timed."""
    monkeypatch.setattr(bench_gpu, "has_torch", lambda: False)
    right = getattr(kernels_cuda, name)

    def wrong(*arguments):
        result = right(*arguments)
        return tuple(x * 2 for x in result) if isinstance(result, tuple) else result * 2

    monkeypatch.setattr(kernels_cuda, name, wrong)
    bench_gpu.bench_training(1e12, 1e15, S=64, sizes=SIZES)
    assert all(row[2].startswith("WRONG") and "absent" in row[5] for row in rows(capsys))
    assert bench_gpu.failures[0].startswith("WRONG training: error")


def test_what_raises_is_a_row(capsys, monkeypatch):
    """The table goes on, whatever fails; the exit code is 1, and what was raised is printed."""
    def breaks(*_, **__):
        raise RuntimeError("no such | thing")

    benches = [name for name in vars(bench_gpu) if name.startswith("bench_")]
    for name in benches:
        monkeypatch.setattr(bench_gpu, name, breaks)
    monkeypatch.setattr(bench_gpu, "print_machine", lambda: print("GPU: one"))
    assert bench_gpu.main([]) == 1
    first, header, line, *table = rows(capsys)
    table = [row for row in table if len(row) > 1]
    assert first == ["GPU: one"] and header[0] == "measurement" and {*line} == {"---"}
    assert len(table) == 1 + 1 + 2 + 12 + 16 + 8 + 1 + 10 + 1 == len(bench_gpu.failures)
    assert all(row[2] == "failed: RuntimeError no such / thing" for row in table)


def test_a_training_step_that_raises(capsys, monkeypatch):
    """Ours is a failure of the script; the peer's is not."""
    monkeypatch.setattr(kernels_cuda, "adam_step", lambda *_: 1 / 0)
    monkeypatch.setattr(bench_gpu, "their_model", lambda *_: 1 / 0)
    bench_gpu.bench_training(1e12, 1e15, S=64, sizes=SIZES)
    for row in rows(capsys):
        assert row[2].startswith("failed: ZeroDivisionError") and "failed: ZeroDiv" in row[5]
    assert bench_gpu.failures == [
        "FAILED training: ZeroDivisionError division by zero"]


@pytest.mark.parametrize("seconds, repeats", [([0.0, 1e9], 3), ([1e9, 1e9], 50), ([1e9, 0.0], 3)])
def test_repeats_are_what_there_is_time_for(seconds, repeats, monkeypatch):
    """Three at least, at most 50, and three once the time is up; beside three to warm up."""
    calls = []
    monkeypatch.setattr(bench_gpu, "SECONDS", seconds)
    assert bench_gpu.median_seconds(lambda: calls.append(1)) >= 0
    assert len(calls) == 3 + repeats


def test_what_there_is_to_do():
    """The numbers that stand in the script, computed by hand."""
    assert bench_gpu.training_operations(4096, bench_gpu.TWO_LAYERS) == (
        2 * 4096 * (226_492_416 + 98_500_608) + 2 * 103_104_380_928,
        4 * 4096 * (226_492_416 + 98_500_608) + 2 * 257_760_952_320)
    assert bench_gpu.adam_bytes(bench_gpu.TWO_LAYERS) == 10_164_215_808
    config = phi3_ref.Phi3Config(**bench_gpu.TWO_LAYERS)
    assert config.count_params() == 423_508_992
