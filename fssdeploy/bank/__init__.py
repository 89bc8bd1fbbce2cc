"""Enrolled classes on disk: versioned, written whole or not at all, readable while another process enrols."""

from fssdeploy.bank.bank import Bank, PruneReport, VersionInfo
from fssdeploy.bank.store import store_class

__all__ = ["Bank", "PruneReport", "VersionInfo", "store_class"]
