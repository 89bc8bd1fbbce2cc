"""Enrolled classes on disk: versioned, written whole or not at all, readable while another process enrols."""

from fssdeploy.bank.bank import Bank, PruneReport, VersionInfo

__all__ = ["Bank", "PruneReport", "VersionInfo"]
