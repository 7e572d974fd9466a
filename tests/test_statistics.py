"""What calibration keeps of inputs: sums, Gram matrices of which half is computed, samples."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_nm.sparsify import statistics
from optimum_nm.sparsify.statistics import InputStatistics, StatisticsCollector

WIDTH = 40


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += result.numel() * args[-1].shape[0]
        return result


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, WIDTH, generator=generator) for size in ((2, 150), (0,), (3,), (1, 7))]


def collected(with_gram):
    found = InputStatistics.empty(torch.nn.Linear(WIDTH, 2), with_gram)
    for batch in batches():
        found.add(batch, 2048, torch.Generator().manual_seed(1))
    return found.complete(), torch.cat([batch.reshape(-1, WIDTH) for batch in batches()]).double()


@pytest.mark.parametrize("columns", [7, 8, WIDTH, 1000])
def test_gram_matrix_and_what_it_tells(monkeypatch, columns):
    monkeypatch.setattr(statistics, "COLUMNS_AT_ONCE", columns)
    found, inputs = collected(with_gram=True)
    weight = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2))
    assert found.tokens == len(inputs) == 310
    torch.testing.assert_close(found.gram.double(), inputs.t() @ inputs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.square_sum.double(), inputs.square().sum(dim=0), rtol=1e-5, atol=0)
    assert torch.equal(found.absolute_max.double(), inputs.abs().amax(dim=0))
    assert found.energy(weight) == pytest.approx((inputs @ weight.t().double()).square().sum().item(), rel=1e-5)


def test_half_of_a_symmetric_matrix_is_not_computed_twice(monkeypatch):
    monkeypatch.setattr(statistics, "COLUMNS_AT_ONCE", WIDTH // 8)
    with Multiplications() as gram:
        found, inputs = collected(with_gram=True)
    with Multiplications() as energy:
        found.energy(torch.ones(12, WIDTH))
    assert gram.count == len(inputs) * WIDTH**2 * 9 // 16
    assert energy.count == 12 * WIDTH**2 * 9 // 16


def test_a_pass_ends_when_all_have_their_inputs():
    """The second pass skips the last layer's product, and the statistics are those of whole passes."""
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Linear(8, 16), torch.nn.ReLU())
    linears = {"first": model[0], "second": model[1]}
    inputs = [torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def statistics_of(early):
        with torch.no_grad(), StatisticsCollector(linears, True, len(inputs), 0) as collector:
            for batch in inputs:
                with Multiplications() as products, collector.inputs_of_one_pass() if early else nullcontext():
                    model(batch)
        return collector.statistics(), products.count

    (whole, all_products), (ended, fewer_products) = statistics_of(False), statistics_of(True)
    assert all_products - fewer_products == 20 * 8 * 16
    for name in linears:
        assert torch.equal(whole[name].gram, ended[name].gram) and whole[name].tokens == ended[name].tokens == 60


@pytest.mark.parametrize("skipped", [True, False])
def test_a_pass_that_calls_a_layer_twice_or_not_goes_to_its_end(skipped):
    first, second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    batch = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), StatisticsCollector({"first": first, "second": second}, True, 3, 0) as collector:
        for _ in range(3):
            with collector.inputs_of_one_pass():
                first(batch) if skipped else first(second(first(batch)))
    found = collector.statistics()
    assert found["first"].tokens == (60 if skipped else 120)


def test_few_inputs_of_many_are_sampled():
    generator = torch.Generator().manual_seed(0)
    found = InputStatistics.empty(torch.nn.Linear(WIDTH, 2), with_gram=False)
    for tokens, sampled in ((100, 100), (1000, 256), (8000, 500), (80_000, 2048)):
        inputs = torch.randn(tokens, WIDTH, generator=generator)
        found.add(inputs, 2048, generator)
        assert len(found.samples[-1]) == sampled
        assert (found.samples[-1][:5, None] == inputs).all(dim=-1).any(dim=-1).all()
