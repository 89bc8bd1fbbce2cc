"""Which systems GSM can stand around. No torch."""

from __future__ import annotations

from typing import Any

from fssdeploy.errors import InputError
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.glue.gsm.gfsam import GFSamHost
from fssdeploy.glue.gsm.matcher import MatcherHost
from fssdeploy.glue.gsm.options import GsmOptions
from fssdeploy.glue.gsm.system import Gsm
from fssdeploy.glue.matcher.system import Matcher

HOSTS = {GFSam: GFSamHost, Matcher: MatcherHost}


def gsm(system: Any, options: GsmOptions | None = None) -> Gsm[Any]:
    """GSM around a loaded system. InputError for one that compares no features of cells, or has no adapter."""
    adapter = HOSTS.get(type(system))
    if adapter is None:
        raise InputError(
            "boost_unsupported",
            f"gsm cannot boost '{getattr(system, 'name', type(system).__name__)}'",
            "it works on the affinity maps of a host",
            "Use it with gfsam or matcher.",
        )
    return Gsm(adapter(system), options)
