"""How stores are opened: endpoint, anonymity and further options of a run; secrets come from the environment.

An address holds none of this, so it can be recorded. The options are set once
per process: by the client as it starts, and in each worker.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from megaseg_dask.errors import SettingsError
from megaseg_dask.stores.address import normalise, scheme_of

_SECRET = re.compile(r"secret|token|password|sas_key|account_key|access_key$", re.IGNORECASE)
# Short values are words of any message.
_LEAST_SECRET = 6


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What ``--endpoint``, ``--anon`` and ``--storage-option`` say.

    ``options`` may name the scheme that they are for, as in ``s3.region``, and
    may hold secrets: they are in no ``repr``.
    """

    endpoint: str | None = None
    anonymous: bool = False
    anonymous_under: str | None = None
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise SettingsError(
                f"--endpoint {self.endpoint}: expected a URL such as https://minio.example.org:9000"
            )

    @classmethod
    def parse(
        cls,
        endpoint: str | None = None,
        anon: bool = False,
        storage_options: Iterable[str] = (),
        source: str | None = None,
    ) -> "StoreOptions":
        """Return the options of a command line; only data below ``source`` are read without credentials.

        Raises :class:`SettingsError` for a storage option that is not ``KEY=VALUE``.
        """
        pairs = []
        for number, text in enumerate(storage_options, start=1):
            key, equals, value = text.partition("=")
            if not (key.strip() and equals):
                # Not the text itself: it may be a secret without its key.
                raise SettingsError(
                    f"--storage-option {number}: expected KEY=VALUE, such as region=us-west-2"
                )
            pairs.append((key.strip(), value.strip()))
        under = normalise(source) if anon and source is not None else None
        return cls(endpoint and endpoint.rstrip("/"), anon, under, tuple(pairs))

    def is_anonymous(self, url: str) -> bool:
        """Tell whether a place is read without credentials."""
        under = self.anonymous_under
        return self.anonymous and (
            under is None or url == under or url.startswith(f"{under.rstrip('/')}/")
        )

    def of_scheme(self, url: str) -> dict[str, str]:
        """Return the options for the store of an address: those for all, and those for its scheme alone."""
        mine, found = scheme_of(url), {}
        for key, value in self.options:
            scheme, dot, name = key.partition(".")
            if not dot:
                found[key] = value
            elif scheme == mine:
                found[name] = value
        return found


_current = StoreOptions()
_is_patient = True


def current() -> StoreOptions:
    """Return the options of this process."""
    return _current


def set_current(options: StoreOptions) -> bool:
    """Set the options of this process, which is patient again; tell whether they are others than before."""
    global _current, _is_patient
    changed, _current = options != _current, options
    _is_patient = True
    return changed


def is_patient() -> bool:
    """Tell whether this process waits for a store that does not answer."""
    return _is_patient


def lose_patience() -> None:
    """Wait no more for stores: one was waited for in vain, and what is left to say to it is little."""
    global _is_patient
    _is_patient = False


def secrets() -> list[str]:
    """Return what may be in no message: values of options and variables that are named as secrets."""
    named = [*_current.options, *os.environ.items()]
    return [value for name, value in named if len(value) >= _LEAST_SECRET and _SECRET.search(name)]


def is_secret(option: str) -> bool:
    """Tell whether an option of a store, ``KEY=VALUE``, is named as a secret, which may be shown nowhere."""
    return bool(_SECRET.search(option.partition("=")[0]))
