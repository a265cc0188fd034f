"""Where `--backend` says that a worker is."""

import pytest

from episodes.errors import BadInput
from proxy.address import Address


@pytest.mark.parametrize(
    "written", ["http://gpu:8001", "http://gpu:8001/", "http://gpu:8001/v1", "http://gpu:8001/v1/"]
)
def test_a_base_url_as_clients_are_given_it_is_the_workers_too(written):
    """Else calls would go to the right place, and the question what is recorded of them to `/v1/v1`."""
    assert Address.parse(written) == Address("http://gpu:8001")


def test_a_socket_is_named_by_its_path():
    assert Address.parse("unix:/run/worker.sock").socket == Address.parse("unix:///run/worker.sock").socket


@pytest.mark.parametrize(
    "written", ["gpu:8001", "http://", "http://gpu/prefix", "http://gpu/prefix/v1", "http://gpu?v1"]
)
def test_what_is_no_workers_address_is_refused(written):
    with pytest.raises(BadInput, match="give a URL without a path"):
        Address.parse(written)
