"""Several processes that train one model."""

import os

import pytest
import torch

pytest.importorskip("triton")

from m3asr.model import Model  # noqa: E402
from training import moe  # noqa: E402
from training.data import Parts, split  # noqa: E402
from training.network import tiny  # noqa: E402
from training.optimizer import Optimizer  # noqa: E402
from training.ranks import Ranks  # noqa: E402

LINES = [{"id": f"{i:03d}", "text": f"text {i % 40}"} for i in range(50)]


def start(seed: int) -> tuple[Model, Optimizer]:
    torch.manual_seed(seed)
    model = Model(tiny(20, 0.0, False)).train()
    moe.start_routers(model)
    moe.install(model)
    optimizer = Optimizer(model, 0.01, True)
    optimizer.lr.fill_(3e-3)
    return model, optimizer


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(100 * rank + step)
    frames = 41 + 8 * rank  # each process has batches of its own length
    return torch.randn(2, frames, 80), torch.tensor([frames, 30], dtype=torch.int32)


def gradients(model: Model, optimizer: Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    (-model(*batch(rank, step))[0][..., 5].mean()).backward()


def work(rank: int, folder: str, port: int) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks = Ranks("cpu")
    model, optimizer = start(rank)  # unlike, until they are made alike
    ranks.same(list(model.state_dict().values()))
    for step in range(3):
        gradients(model, optimizer, rank, step)
        ranks.average(optimizer.gradients)
        optimizer.step(torch.tensor(True))
    found = {"weights": model.state_dict(), "agreed": ranks.agree(0.25 + rank, rank), "share": ranks.share(LINES)}
    torch.save(found, f"{folder}/{rank}.pt")
    ranks.leave()


def test_two_processes_take_the_mean_of_their_gradients(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path), 20000 + os.getpid() % 20000), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["agreed"] == second["agreed"] == [0.25, 0.0]
    shared = [line["id"] for line in first["share"] + second["share"]]
    assert len(shared) == len(set(shared)) == len(LINES) and abs(len(first["share"]) - len(second["share"])) <= 1
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    alone, optimizer = start(0)
    for step in range(3):
        total = torch.zeros_like(optimizer.gradients)
        for rank in (0, 1):
            gradients(alone, optimizer, rank, step)
            total += optimizer.gradients / 2
        optimizer.gradients.copy_(total)
        optimizer.step(torch.tensor(True))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_one_process_asks_nobody():
    ranks = Ranks("cpu")
    values = torch.arange(4.0)
    ranks.average(values)
    assert ranks.first and ranks.share(LINES) == LINES and ranks.agree(0.5, 1) == [0.5, 1]
    assert torch.equal(values, torch.arange(4.0))


def test_parts_and_development_lines_are_shared_out_alike(tmp_path):
    import numpy as np

    for number in range(5):
        np.save(tmp_path / f"{number:05d}.npy", np.full(10, number, np.int16))
        (tmp_path / f"{number:05d}.jsonl").write_text('{"id": "k", "text": "a", "offset": 0, "size": 10}\n')
    found = [[int(flat[0]) for flat, _ in Parts(tmp_path, rank, 2).new()] for rank in (0, 1)]
    assert found == [[0, 2, 4], [1, 3]]
    training, development = split(LINES, 10)
    assert len(development) == 10 and not {x["text"] for x in training} & {x["text"] for x in development}
    assert split(LINES, 10) == (training, development)
