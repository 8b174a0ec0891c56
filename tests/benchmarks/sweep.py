"""Time of `cross_validate` over 45 penalties, beside scikit-learn.

    python -m tests.benchmarks.sweep [--data DIR] [--only NAME ...] [--picture FILE] [--limit 60]

C goes from 1e-6 to 1e5 in 45 steps, as for the linear probes of DINOv2 (Oquab et al. 2023), with
5 stratified folds: 225 fits and the 45 of all examples, where scikit-learn has one more. A
contender's gap is the largest (objective - best) / best of its fits to the folds, computed in
float64; best is that of `cross_validate` in float64 with tol=1e-8.

Peers are LogisticRegressionCV and a loop over LogisticRegression with warm_start, from strong to
weak penalties. Solvers, dtypes and tolerances, from loose to tight, are tried on the first fold,
each for up to `--limit` seconds; the fastest that brings every entry to a gap of 1e-4 there is then
run on all folds, in both ways. Where the limit ends all of them, the ratio is a lower bound: the
limit times the folds.

The picture has the time per fit against the number of fits in one call.

Problems: scikit-learn's digits (pixels / 16), and with `--data` each .npz of the folder with arrays
X and y (bytes are divided by 255 if they go that far), of which the first 10000 rows are taken.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from jaxsoftmax import CrossValidation, Params, Status, cross_validate, fit
from tests.benchmarks._measure import environment, medians, stored

CS = np.logspace(-6, 5, 45)
FOLDS = 5
GAP = 1e-4
TOLERANCES = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
LARGEST_HESSIAN = 3000  # classes x features for newton-cholesky
ROWS = 20_000


class Data(NamedTuple):
    name: str
    features: NDArray[Any]
    labels: NDArray[Any]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def folds(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Examples that each fold fits, and that it holds out. All fit equally many, so that a C is
        the same l2 for all."""
        split = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        folds = list(split.split(self.features, self.labels))
        least = min(len(fitted) for fitted, _ in folds)
        return [(fitted[:least], held_out) for fitted, held_out in folds]


class Run(NamedTuple):
    """Seconds for all folds, and the objectives of their fits (folds, penalties)."""

    name: str
    seconds: float
    objectives: NDArray[Any]


def problems(folder: Path | None) -> Iterator[Data]:
    images, labels = load_digits(return_X_y=True)
    yield Data("digits", images / 16, labels)
    for name, features, labels in stored(folder):
        rows = slice(10_000 if len(labels) > ROWS else None)
        yield Data(name, features[rows], labels[rows])


def objective(data: Data, rows: NDArray[Any], params: Any, strength: float) -> float:
    weights, bias = (np.asarray(value, np.float64) for value in params)
    logits = data.features[rows] @ weights.T + bias
    own = logits[np.arange(len(logits)), data.labels[rows]]
    return float(
        np.mean(logsumexp(logits, 1) - own) + (weights**2).sum() / (2 * strength * len(rows))
    )


def objectives(data: Data, weights: Any, bias: Any) -> NDArray[Any]:
    """Of parameters with axes (folds, penalties), as many as there are."""
    return np.array(
        [
            [
                objective(data, rows, params, strength)
                for *params, strength in zip(*of_fold, CS, strict=False)
            ]
            for (rows, _), *of_fold in zip(data.folds(), weights, bias, strict=False)
        ]
    )


def ours(data: Data, dtype: str, tol: float) -> Callable[[], CrossValidation]:
    features, labels = jnp.asarray(data.features, dtype), jnp.asarray(data.labels)
    masks = np.full((FOLDS, len(labels)), -1, np.int8)
    for mask, (fitted, held_out) in zip(masks, data.folds(), strict=True):
        mask[fitted], mask[held_out] = 0, 1
    l2s = jnp.asarray(1 / (CS * len(fitted)), dtype)
    folds = jnp.asarray(masks)
    return lambda: cross_validate(
        features, labels, num_classes=data.classes, l2s=l2s, folds=folds, tol=tol
    )


def loop(
    data: Data, solver: str, dtype: str, tol: float, folds: int, limit: float
) -> tuple[float, list[list[NDArray[Any]]], list[list[NDArray[Any]]]]:
    """Seconds, weights and biases of warm-started fits to the first folds, until the limit."""
    features = data.features.astype(dtype)
    weights: list[list[NDArray[Any]]] = []
    biases: list[list[NDArray[Any]]] = []
    start = time.perf_counter()
    for fitted, held_out in data.folds()[:folds]:
        model = LogisticRegression(solver=solver, tol=tol, max_iter=20_000, warm_start=True)
        weights.append([])
        biases.append([])
        x, y = features[fitted], data.labels[fitted]
        for strength in CS:
            model.set_params(C=strength).fit(x, y)
            weights[-1].append(model.coef_.copy())
            biases[-1].append(model.intercept_.copy())
            model.predict_log_proba(features[held_out])
            if time.perf_counter() - start > limit:
                return time.perf_counter() - start, weights, biases
    return time.perf_counter() - start, weights, biases


def library_loop(
    data: Data, solver: str, dtype: str, tol: float, jobs: int
) -> tuple[float, NDArray[Any], NDArray[Any]]:
    """The same of LogisticRegressionCV and all folds."""
    features = data.features.astype(dtype)
    model = LogisticRegressionCV(
        Cs=CS,
        cv=data.folds(),
        solver=solver,
        tol=tol,
        max_iter=20_000,
        scoring="neg_log_loss",
        l1_ratios=(0,),
        use_legacy_attributes=False,
        n_jobs=jobs,
    )
    start = time.perf_counter()
    model.fit(features, data.labels)
    seconds = time.perf_counter() - start
    paths = model.coefs_paths_[:, 0]
    return seconds, paths[..., :-1], paths[..., -1]


def screened(
    data: Data, best: NDArray[Any], limit: float
) -> tuple[float, tuple[str, str, float] | None]:
    """The fastest setting of scikit-learn that reaches the gap on the first fold, and its seconds;
    without one, the time that was spent on the longest."""
    solvers = ["lbfgs", "newton-cg"]
    if data.classes * data.features.shape[1] <= LARGEST_HESSIAN:
        solvers.append("newton-cholesky")
    reached: list[tuple[float, tuple[str, str, float]]] = []
    longest = 0.0
    for solver in solvers:
        for dtype in ("float32", "float64"):
            for tol in TOLERANCES:
                most = min([limit, *(seconds for seconds, _ in reached)])
                seconds, weights, biases = loop(data, solver, dtype, tol, 1, most)
                longest = max(longest, seconds)
                values = objectives(data, weights, biases)[0]
                gap = np.max(values / best[0, : len(values)]) - 1
                whole = len(values) == len(CS)
                print(
                    f"  first fold: {solver} {dtype} tol={tol:.0e} {seconds:8.2f} s, "
                    f"{len(values)} fits, gap {gap:.0e}",
                    flush=True,
                )
                if whole and gap <= GAP:
                    reached.append((seconds, (solver, dtype, tol)))
                if not whole or gap <= GAP:
                    break
    return min(reached) if reached else (longest, None)


def whole(data: Data, best: NDArray[Any], solver: str, dtype: str, tol: float) -> tuple[float, str]:
    """Seconds of a setting on all folds in the fastest way, and its name; with a smaller tolerance
    where another fold needs that."""
    runs: dict[str, tuple[float, Any, Any]] = {
        "loop": loop(data, solver, dtype, tol, FOLDS, math.inf)
    }
    for jobs in (1, 2):
        name = f"LogisticRegressionCV, n_jobs={jobs}"
        runs[name] = library_loop(data, solver, dtype, tol, jobs)
    gaps = []
    for name, (seconds, weights, biases) in runs.items():
        gaps.append(np.max(objectives(data, weights, biases) / best) - 1)
        print(f"  {name}, tol={tol:.0e}: {seconds:.2f} s, gap {gaps[-1]:.1e}", flush=True)
    if max(gaps) > GAP and tol > TOLERANCES[-1]:
        return whole(data, best, solver, dtype, tol / 10)
    seconds, name = min((seconds, name) for name, (seconds, *_) in runs.items())
    return seconds, f"{name}, {solver} {dtype} tol={tol:.0e}"


def report(data: Data, limit: float) -> list[float]:
    """Print a problem's table; gives the ratios of both dtypes."""
    shape = "{} x {}".format(*data.features.shape)
    print(f"\n{data.name}: {shape}, {data.classes} classes", flush=True)
    calls, first, results = {}, {}, {}
    for dtype in ("float32", "float64"):
        calls[dtype] = ours(data, dtype, GAP)
        start = time.perf_counter()
        results[dtype] = jax.block_until_ready(calls[dtype]())
        first[dtype] = time.perf_counter() - start
    best = objectives(data, *ours(data, "float64", 1e-8)().fold_fits.params)
    for dtype, result in results.items():
        gap = np.max(objectives(data, *result.fold_fits.params) / best) - 1
        statuses = np.append(result.fold_fits.status, result.path.status)
        counts = {Status(s).name: int(np.sum(statuses == s)) for s in np.unique(statuses)}
        claimed = float(jnp.max(result.fold_fits.gap))
        print(
            f"  jaxsoftmax {dtype}: gap {gap:.1e}, certified {claimed:.1e}, {counts}, "
            f"best C {CS[result.best]:.1e}"
        )
    seconds = medians(calls, repeats=3, least=0.1)
    of_peer, setting = screened(data, best, limit)
    peer, name = of_peer * FOLDS, "none, at least"
    if setting is not None:
        peer, name = whole(data, best, *setting)
    for dtype, spent in seconds.items():
        print(
            f"  jaxsoftmax {dtype}: {spent:.3f} s, compilation {first[dtype] - spent:.1f} s; "
            f"peer / ours {peer / spent:.1f} ({name} {peer:.1f} s)",
            flush=True,
        )
    return [peer / spent for spent in seconds.values()]


def picture(path: Path) -> None:
    """Seconds per fit of bootstrap replicates and of penalties, against their number."""
    import matplotlib.pyplot as plt

    (data,) = problems(None)
    features, labels = jnp.asarray(data.features, jnp.float32), jnp.asarray(data.labels)
    examples = len(labels)
    l2 = 1e-3

    @jax.jit
    def replicates(weights: jax.Array) -> Params:
        return jax.vmap(
            lambda weight: fit(
                features, labels, num_classes=data.classes, l2=l2, sample_weight=weight, tol=GAP
            )
        )(weights).params

    @jax.jit
    def penalties(l2s: jax.Array) -> Params:
        return jax.vmap(lambda l2: fit(features, labels, num_classes=data.classes, l2=l2, tol=GAP))(
            l2s
        ).params

    counts = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(examples, np.full(examples, 1 / examples), size=counts[-1])
    weights = jnp.asarray(drawn, jnp.float32)
    curves: dict[str, list[float]] = {"bootstrap replicates": [], "penalties": []}
    for count in counts:
        seconds = medians(
            {
                "bootstrap replicates": partial(replicates, weights[:count]),
                "penalties": partial(penalties, jnp.logspace(0, -8, count, dtype=jnp.float32)),
            },
            repeats=5,
            least=0.05,
        )
        for name, curve in curves.items():
            curve.append(seconds[name] / count * 1e3)
    peers = {}
    x = data.features.astype(np.float32)
    for solver in ("lbfgs", "newton-cg"):
        model = LogisticRegression(solver=solver, C=1 / (l2 * examples), tol=1e-3, max_iter=1000)
        start = time.perf_counter()
        for weight in drawn[:8]:
            model.fit(x, data.labels, sample_weight=weight)
        peers[solver] = (time.perf_counter() - start) / 8 * 1e3
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.loglog(counts, curve, marker="o", label=f"jaxsoftmax, {name}")
    for solver, milliseconds in peers.items():
        axes.axhline(milliseconds, color="0.5", linestyle=":" if solver == "lbfgs" else "--")
        axes.text(counts[-1], milliseconds, f"scikit-learn {solver}", ha="right", va="bottom")
    axes.set(xlabel="fits in one call", ylabel="milliseconds a fit", title="digits, float32")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    for name, curve in curves.items():
        print(
            f"\nmilliseconds a fit, {name}:",
            dict(zip(counts, np.round(curve, 2).tolist(), strict=True)),
        )
    each = {solver: round(milliseconds, 2) for solver, milliseconds in peers.items()}
    print(f"scikit-learn, replicates one by one: {each}\npicture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--picture", type=Path, default=Path("build/sweep.png"))
    parser.add_argument("--limit", type=float, default=60)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    print(environment("jaxsoftmax", "jax", "jaxlib", "scikit-learn"))
    ratios = [
        report(data, arguments.limit)
        for data in problems(arguments.data)
        if not arguments.only or data.name in arguments.only
    ]
    for dtype, column in zip(
        ("float32", "float64"), zip(*ratios, strict=True), strict=bool(ratios)
    ):
        print(
            f"\npeer / ours, {dtype}: geometric mean {statistics.geometric_mean(column):.1f}, "
            f"least {min(column):.1f}"
        )
    picture(arguments.picture)


if __name__ == "__main__":
    main()
