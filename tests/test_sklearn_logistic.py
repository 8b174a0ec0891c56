"""scikit-learn's own tests of its logistic regressions, of the installed version, with our classes.

These take the place of theirs in their test module, behind adapters: their solvers become ours,
parameters and axes that only theirs have are dropped and added, and dense arrays stand for sparse
ones. Each of their tests is in `RUN`, or in `LEFT_OUT` under the reason.

Most of the time would go into the compilation of a program for each shape. So problems get columns
of zeros and examples without weight, and grids get folds and penalties once more, up to one shape
for all; none of it changes the rest of a fit.
"""

import itertools
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
import sklearn
from numpy.typing import NDArray
from sklearn.linear_model._base import LinearClassifierMixin

from jaxsoftmax import fit
from jaxsoftmax.estimator import SoftmaxRegression, SoftmaxRegressionCV

pytestmark = [
    pytest.mark.single,
    pytest.mark.slow,
    pytest.mark.usefixtures("no_jaxtyping"),
    pytest.mark.skipif(
        not sklearn.__version__.startswith("1.9."), reason="the lists are those of scikit-learn 1.9"
    ),
]

ROWS, WIDTH, FOLDS, PENALTIES = 1024, 20, 5, 10
SOLVERS = {"newton-cg": "auto", "lbfgs": "lbfgs"}


class Adapter(SoftmaxRegression):
    """`SoftmaxRegression` with the signature of their class.

    Their `tol` bounds the gradient: at their default of 1e-4 it says less than ours.
    """

    _predict_proba_lr = LinearClassifierMixin._predict_proba_lr

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        name: constraint
        for name, constraint in SoftmaxRegression._parameter_constraints.items()
        if name != "solver"
    }

    def __init__(
        self,
        C: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        dual: bool = False,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        class_weight: Any = None,
        random_state: Any = None,
        tol: float = 1e-4,
        max_iter: int = 100,
        solver: str = "newton-cg",
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            C=C,
            fit_intercept=fit_intercept,
            class_weight=class_weight,
            tol=tol,
            max_iter=max_iter,
            solver=solver,
            warm_start=warm_start,
            verbose=verbose,
        )
        self.l1_ratio = l1_ratio
        self.dual = dual
        self.intercept_scaling = intercept_scaling
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "Adapter":
        given = self.solver, self.tol
        self.solver, self.tol = SOLVERS.get(self.solver, "auto"), min(self.tol, 1e-6)
        try:
            super().fit(X, y, sample_weight)
        finally:
            self.solver, self.tol = given
        return self


class AdapterCV(SoftmaxRegressionCV):
    """`SoftmaxRegressionCV` with the signature of their class and the shapes of its attributes."""

    C_: Any
    l1_ratio_: Any
    scores_: Any
    coefs_paths_: Any
    n_iter_: Any

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        name: constraint
        for name, constraint in SoftmaxRegressionCV._parameter_constraints.items()
        if name not in ("solver", "one_standard_error")
    }

    def __init__(
        self,
        *,
        Cs: Any = 10,
        l1_ratios: Any = None,
        fit_intercept: bool = True,
        cv: Any = None,
        scoring: Any = "accuracy",
        solver: str = "lbfgs",
        tol: float = 1e-4,
        max_iter: int = 100,
        class_weight: Any = None,
        refit: bool = True,
        verbose: int = 0,
        random_state: Any = None,
        use_legacy_attributes: bool = True,
    ) -> None:
        super().__init__(
            Cs=Cs,
            fit_intercept=fit_intercept,
            cv=cv,
            scoring=scoring,
            solver=solver,
            tol=tol,
            max_iter=max_iter,
            class_weight=class_weight,
            refit=refit,
            verbose=verbose,
        )
        self.l1_ratios = l1_ratios
        self.random_state = random_state
        self.use_legacy_attributes = use_legacy_attributes

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
    ) -> "SoftmaxRegressionCV":
        given = self.solver, self.tol
        # The solvers agree, as other tests show: here one spares the compilation of the other.
        self.solver, self.tol = "auto", min(self.tol, 1e-6)
        try:
            super().fit(X, y, sample_weight, groups)
        finally:
            self.solver, self.tol = given
        self.l1_ratios_, self.l1_ratio_ = np.array(self.l1_ratios or [None]), 0.0
        if self.use_legacy_attributes:
            self._shape_as_before()
        else:
            for name in ("scores_", "coefs_paths_", "n_iter_"):
                setattr(self, name, getattr(self, name)[:, None])
        return self

    def _grid(self, examples: Any, fitted: Any, held_out: Any, l2s: Any) -> Any:
        folds, penalties = len(held_out), l2s.shape[1]
        width = examples.X.shape[1]
        again = np.minimum(np.arange(FOLDS), folds - 1)
        grid = super()._grid(
            examples._replace(
                X=larger(examples.X, ROWS, WIDTH),
                labels=larger(examples.labels, ROWS),
            ),
            larger(fitted[[*again, -1]], FOLDS + 1, ROWS),
            larger(held_out[again], FOLDS, ROWS),
            np.pad(l2s[[*again, -1]], [(0, 0), (0, PENALTIES - penalties)], "edge"),
        )
        fits = jax.tree.map(lambda v: v[[*range(folds), -1], :penalties], grid.fits)
        params = fits.params._replace(weights=fits.params.weights[..., :width])
        scores = jax.tree.map(lambda v: v[:folds, :penalties], grid.scores)
        return type(grid)(fits._replace(params=params), scores)

    def _shape_as_before(self) -> None:
        rows = self.classes_[-len(self.coef_) :]
        with_ratios: Any = slice(None) if self.l1_ratios is None else (..., None)
        paths = self.coefs_paths_ if self.l1_ratios is None else self.coefs_paths_[:, :, None]
        self.coefs_paths_ = dict(zip(rows, np.moveaxis(paths, -2, 0), strict=True))
        self.scores_ = dict.fromkeys(rows, self.scores_[with_ratios])
        self.n_iter_ = self.n_iter_[with_ratios][None]
        self.C_, self.l1_ratio_ = np.full(len(rows), self.C_), np.zeros(len(rows))


def larger(values: Any, *shape: int) -> Any:
    """With zeros up to a shape, as far as it is the larger."""
    sizes = zip(values.shape, shape, strict=True)
    return np.pad(values, [(0, max(least - size, 0)) for size, least in sizes])


def fit_larger(features: Any, labels: Any, *, sample_weight: Any, init: Any, **options: Any) -> Any:
    result = fit(
        larger(features, ROWS, WIDTH),
        larger(labels, ROWS),
        sample_weight=larger(sample_weight, ROWS),
        init=init._replace(weights=larger(init.weights, 0, WIDTH)),
        **options,
    )
    weights = result.params.weights[:, : features.shape[1]]
    return result._replace(params=result.params._replace(weights=weights))


def dense(X: Any, dtype: Any = None) -> NDArray[Any]:
    return np.asarray(X, dtype)


SEED: dict[str, list[Any]] = {"global_random_seed": [42]}
CONTAINER: dict[str, list[Any]] = {"csr_container": [dense]}
NEWTON: dict[str, list[Any]] = {"solver": ["newton-cg"]}
INTERCEPT: dict[str, list[Any]] = {"fit_intercept": [False, True]}
CLASS_WEIGHTS: dict[str, list[Any]] = {
    "weight": [{0: 0.1, 1: 0.2}, {0: 0.1, 1: 0.2, 2: 0.5}],
    "class_weight": ["weight", "balanced"],
}
RUN: dict[str, dict[str, list[Any]]] = {
    "test_predict_2_classes": CONTAINER,
    "test_predict_3_classes": CONTAINER,
    "test_logistic_glmnet": NEWTON,
    "test_inconsistent_input": {},
    "test_write_parameters": {},
    "test_nan": {},
    "test_multinomial_logistic_regression_string_inputs": {},
    "test_logistic_regression_solvers": SEED,
    "test_logistic_regression_solvers_multiclass": INTERCEPT,
    "test_logistic_regression_solvers_multiclass_unpenalized": INTERCEPT | SEED,
    "test_logistic_regression_sample_weights": {"problem": ["single", "cv"]} | NEWTON | SEED,
    "test_logistic_regression_solver_class_weights": NEWTON | SEED,
    "test_logistic_regression_class_weights": CONTAINER | SEED,
    "test_liblinear_decision_function_zero": SEED,
    "test_logreg_intercept_scaling_zero": {},
    "test_logreg_predict_proba_multinomial": SEED,
    "test_max_iter": NEWTON
    | {"max_iter": [1, 2, 3, 4], "message": ["The fit has not converged: MAX_ITER"]}
    | SEED,
    "test_n_iter": {"use_legacy_attributes": [True, False]} | NEWTON,
    "test_warm_start": {"warm_start": [True, False]} | INTERCEPT | NEWTON | SEED,
    "test_dtype_match": NEWTON | INTERCEPT | CONTAINER,
    "test_warm_start_converge_LR": SEED,
    "test_LogisticRegressionCV_on_folds": {},
    "test_c_inf_no_warning": NEWTON,
    "test_logisticregression_liblinear_sample_weight": {"params": [{"max_iter": 1000}]} | SEED,
    "test_multinomial_identifiability_on_iris": NEWTON | INTERCEPT,
    "test_sample_weight_not_modified": {
        "class_weight": [{0: 1.0, 1: 10.0, 2: 1.0}, "balanced"],
    },
    "test_single_feature_newton_cg": {},
    "test_logistic_cv": {"use_legacy_attributes": [True, False]} | SEED,
    "test_logistic_cv_refit_false_non_elasticnet": SEED,
    "test_logistic_cv_mock_scorer": {},
    "test_multinomial_cv_iris": {"use_legacy_attributes": [True, False]},
    "test_logistic_cv_folds_with_classes_missing": {
        "enable_metadata_routing": [False, True],
        "n_classes": [2, 3],
    },
    "test_logistic_regressioncv_class_weights": CLASS_WEIGHTS | SEED,
    "test_logistic_regression_cv_refit": {"l1_ratio": [0]} | SEED,
    "test_LogisticRegressionCV_no_refit": {"l1_ratios": [(0,)], "n_classes": [2, 3]},
    "test_lr_cv_scores_without_enabling_metadata_routing": {},
    # As of their L-BFGS it asks of it no more than 0 iterations: the bias is already fitted then.
    "test_zero_max_iter": {"solver": ["lbfgs"]},
}

LEFT_OUT = {
    "of the routing of metadata: weights go to every scorer that takes them": """
        lr_cv_scores_differ_when_sample_weight_is_requested
        passing_params_without_enabling_metadata_routing""",
    "of the L1 penalty or the elastic net": """
        elasticnet_l1_ratio_err_helpful logreg_l1 saga_vs_liblinear elastic_net_coeffs
        elastic_net_l1_l2_equivalence elastic_net_vs_l1_l2 l1_ratio_non_elasticnet
        LogisticRegression_elastic_net_objective elastic_net_versus_sgd liblinear_not_stuck
        LogisticRegressionCV_GridSearchCV_elastic_net
        LogisticRegressionCV_elasticnet_attribute_shapes scores_attribute_layout_elasticnet""",
    "of what one of their solvers alone does or cannot do": """
        check_solver_option liblinear_dual_random_state liblinear_with_large_values
        liblinear_multiclass_raises sample_and_class_weight_equivalence_liblinear
        newton_cholesky_fallback_to_lbfgs""",
    "of their private functions": """
        consistency_path logistic_regression_path_convergence_fail
        logistic_regression_path_coefs_multinomial logistic_regression_path_init_coefs
        logistic_cv_multinomial_score""",
    "of parameters and defaults that are going away": """
        lr_scoring_warns get_default_scorer logisticregressioncv_warns_with_use_legacy_attributes
        penalty_none penalty_deprecated l1_ratio_None_deprecated lr_penalty_l1ratio_incompatible
        logisticregression_warns_with_n_jobs""",
    "of two calls of one iteration as one of two: ours adapts its precision within a call": (
        "warm_start_newton_solver"
    ),
    "of sparse features and coefficients": "sparsify large_sparse_matrix logistic_cv_sparse",
    "of array-API dispatch: every array is taken, and what comes out is NumPy's": """
        logistic_regression_array_api_compliance logistic_regression_array_api_warm_start""",
    "of callbacks in each iteration: ours run in one compiled program": """
        logistic_regression_callback_support logistic_regression_callback_fitted_estimator
        logistic_regression_callback_support_warning""",
}

CASES = [
    pytest.param(name, dict(zip(values, choice, strict=True)), id=f"{name}-{number}")
    for name, values in RUN.items()
    for number, choice in enumerate(itertools.product(*values.values()))
]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Any:
    pytestconfig.addinivalue_line("markers", "thread_unsafe: a marker of scikit-learn's tests")
    import sklearn.linear_model.tests.test_logistic as module

    monkeypatch.setattr(module, "LogisticRegression", Adapter)
    monkeypatch.setattr(module, "LogisticRegressionCV", AdapterCV)
    monkeypatch.setattr("jaxsoftmax.estimator._regression.fit", fit_larger)
    return module


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_it_passes_theirs(
    theirs: Any, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any]
) -> None:
    solvers = tuple(SOLVERS) if "solvers" in name else ("newton-cg",)
    monkeypatch.setattr(theirs, "SOLVERS", solvers)
    getattr(theirs, name)(**arguments)


def test_each_of_theirs_is_run_or_has_a_reason(theirs: Any) -> None:
    left_out = {f"test_{name}" for names in LEFT_OUT.values() for name in names.split()}
    assert not left_out & set(RUN)
    assert left_out | set(RUN) == {name for name in vars(theirs) if name.startswith("test_")}
