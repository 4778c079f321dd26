"""Every class of transformers that predicts text: trained as in PEFT, or refused with its reason.

A class that is new in transformers stands in no table, so it has to be built and trained.
"""

import pytest

from tests.train.causal_models import NOT_BUILT, REFUSED, make, model_types
from tests.train.peft_gradients import assert_refused, assert_trained_as_in_peft

pytestmark = pytest.mark.real


@pytest.mark.parametrize("model_type", model_types())
def test_a_class_is_trained_as_in_peft_or_refused(model_type, tmp_path):
    if model_type in NOT_BUILT:
        with pytest.raises(Exception, match=NOT_BUILT[model_type][0]):
            make(model_type)
    elif model_type in REFUSED:
        assert_refused(model_type, tmp_path)
    else:
        assert_trained_as_in_peft(model_type, tmp_path)


def test_the_tables_name_classes_that_there_are():
    assert REFUSED.keys() | NOT_BUILT.keys() <= set(model_types())
    assert not REFUSED.keys() & NOT_BUILT.keys()
