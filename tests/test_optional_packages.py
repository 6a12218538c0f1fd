"""Optional packages: the module when it is there, and which extra to install when it is not."""

import json

import pytest

from consistency_lens.optional_packages import require


def test_an_installed_package_is_returned():
    assert require("json", extra="lora", needed_for="this") is json


def test_a_missing_package_names_its_extra():
    with pytest.raises(
        ValueError, match=r'training needs the package .*pip install "consistency-lens\[lora\]"'
    ) as error:
        require("no_such_package_of_ours", extra="lora", needed_for="training")
    assert "\n" not in str(error.value)
