"""scikit-learn's own tests of `LogisticRegression`, of the installed version, with our class in it.

The class takes the place of theirs in their test module, behind an adapter: their solvers are names
for ours, and parameters that only their solvers have are dropped. Tests of what ours does not have
are listed below with the reason; all others run, also those that a later version may add.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model.tests.test_logistic as theirs
from sklearn.linear_model import LogisticRegression

from jaxsoftmax.estimator import SoftmaxRegression
