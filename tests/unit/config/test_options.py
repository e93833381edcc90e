"""Settings as options of a tool: what is not given has its default, and what is wrong is named as it was given."""

import argparse
from ipaddress import ip_network

import pytest

from megatron_keye.config.options import add_options, read_options
from megatron_keye.config.schema import StorageConfig
from megatron_keye.errors import SettingsError

NAMES = ("attempts", "medium_bytes", "private_networks")


def read(*given):
    parser = argparse.ArgumentParser()
    add_options(parser, StorageConfig, NAMES)
    return read_options(parser.parse_args(given), StorageConfig, NAMES)


def test_what_is_not_given_has_its_default():
    assert read() == StorageConfig()
    assert read("--attempts", "2") == StorageConfig(attempts=2)


def test_several_values_are_given_one_by_one():
    networks = read("--private-networks", "10.0.0.0/8", "--private-networks", "fd00::/8").private_networks
    assert networks == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def test_what_is_wrong_is_named_as_it_was_given():
    with pytest.raises(SettingsError) as error:
        read("--medium-bytes", "many", "--private-networks", "inside")
    assert [problem.partition(" ")[0] for problem in error.value.problems] == ["--medium-bytes", "--private-networks"]


def test_every_option_has_its_description():
    parser = argparse.ArgumentParser()
    add_options(parser, StorageConfig, StorageConfig.model_fields)
    assert "Most bytes of an image or video at a web address." in " ".join(parser.format_help().split())
