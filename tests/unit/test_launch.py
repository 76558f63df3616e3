"""The cluster that the driver asks for."""

from __future__ import annotations
