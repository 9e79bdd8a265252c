"""The contract of estimators whose input is not a feature matrix: what scikit-learn promises, on logits.

`check_recalibrator(estimator, logits, labels)` runs all of it; chapters with recalibrators of their own call it too.
"""

import inspect
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError


def check_recalibrator(estimator, logits, labels):
    """Assert clone, parameters, fitted attributes, refit, untouched input, kinds and dtypes, and errors.

    Args:
        estimator: not fitted, and deterministic (a `random_state` where it draws numbers).
        logits: tensor (n, C), or (n, V, C) for several views.
        labels: tensor (n,).
    """
    _check_parameters(estimator)
    _check_not_fitted(estimator, logits)
    fitted = clone(estimator)
    kept = logits.clone(), labels.clone()
    assert fitted.fit(logits, labels) is fitted
    assert torch.equal(logits, kept[0]), "fit changed the logits"
    assert torch.equal(labels, kept[1]), "fit changed the labels"
    before = repr(vars(fitted))
    probs, transformed = fitted.predict_proba(logits), fitted.transform(logits)
    assert repr(vars(fitted)) == before, "transform changed the estimator"
    assert torch.equal(logits, kept[0]), "transform changed the logits"
    assert transformed.shape == probs.shape == (logits.shape[0], logits.shape[-1])
    torch.testing.assert_close(torch.softmax(transformed, 1), probs)
    assert {name for name in vars(fitted) if not name.endswith("_")} == set(fitted.get_params())
    _check_refit(estimator, fitted, logits, labels, probs)
    _check_kinds(estimator, logits, labels, probs)
    _check_errors(estimator, fitted, logits, labels)


def _check_parameters(estimator):
    assert isinstance(estimator, BaseEstimator)
    names = [name for name in inspect.signature(type(estimator).__init__).parameters if name != "self"]
    assert sorted(estimator.get_params()) == sorted(names)
    copy = clone(estimator)
    for name, value in estimator.get_params().items():
        assert getattr(copy, name) is value or getattr(copy, name) == value
        assert copy.set_params(**{name: value}) is copy
    assert type(estimator).__name__ in repr(estimator)
    with pytest.raises(ValueError, match="Invalid parameter"):
        copy.set_params(no_such_parameter=1)
    default = type(estimator)()
    for name in names:
        given = inspect.signature(type(estimator).__init__).parameters[name].default
        assert getattr(default, name) is given, f"{name} was changed by __init__"


def _check_not_fitted(estimator, logits):
    for method in ("transform", "predict_proba"):
        with pytest.raises(NotFittedError):
            getattr(clone(estimator), method)(logits)


def _check_refit(estimator, fitted, logits, labels, probs):
    again = clone(fitted).fit(logits[::2], labels[::2]).fit(logits, labels)
    torch.testing.assert_close(again.predict_proba(logits), probs, msg="a second fit remembers the first")
    restored = pickle.loads(pickle.dumps(fitted))  # a file of our own, never one from outside
    torch.testing.assert_close(restored.predict_proba(logits), probs)
    few = fitted.predict_proba(logits[:3])
    torch.testing.assert_close(few, probs[:3], msg="a row depends on the rows beside it")


def _check_kinds(estimator, logits, labels, probs):
    for dtype in (torch.float32, torch.float64):
        fitted = clone(estimator).fit(logits.to(dtype), labels)
        out = fitted.predict_proba(logits.to(dtype))
        assert out.dtype == dtype
        assert not out.requires_grad
        torch.testing.assert_close(out.to(probs), probs, atol=2e-2, rtol=0)
    array = logits.numpy().copy()
    array.flags.writeable = False  # memory-mapped data are like this
    from_array = clone(estimator).fit(array, labels.numpy()).predict_proba(array)
    assert isinstance(from_array, np.ndarray)
    assert from_array.dtype == array.dtype
    np.testing.assert_allclose(from_array, probs.numpy(), atol=1e-5)
    from_list = clone(estimator).fit(logits.tolist(), labels.tolist()).predict_proba(logits.tolist())
    assert isinstance(from_list, np.ndarray)
    with torch.no_grad():
        torch.testing.assert_close(clone(estimator).fit(logits, labels).predict_proba(logits), probs)


def _check_errors(estimator, fitted, logits, labels):
    n_classes = logits.shape[-1]
    bad = logits.clone()
    bad.view(-1)[0] = float("nan")
    for wrong, match in ((bad, "finite"), (logits.softmax(-1), "probabilities"), (logits[:0], "sample|shape")):
        with pytest.raises(ValueError, match=match):
            clone(estimator).fit(wrong, labels[: len(wrong)])
    with pytest.raises(ValueError, match="one per sample"):
        clone(estimator).fit(logits, labels[:-1])
    with pytest.raises(ValueError, match=f"0..{n_classes - 1}"):
        clone(estimator).fit(logits, labels + n_classes)
    with pytest.raises(TypeError, match="whole numbers"):
        clone(estimator).fit(logits, labels.double() + 0.5)
    with pytest.raises(TypeError):
        clone(estimator).fit("logits", labels)
    with pytest.raises(ValueError, match=f"expected {n_classes} classes"):
        fitted.transform(logits[..., :-1])
    with pytest.raises(ValueError, match="finite"):
        fitted.predict_proba(bad)
