"""Patches between two bundles: the new archive, compressed by Zstandard with the installed bundle's files as dictionary.

This is Zstandard's own way to patch ("zstd --patch-from", RFC 8878 with a raw dictionary). An archive is stored, not
deflated, so what two bundles share is the same bytes in both.
"""

from pathlib import Path

import zstandard

from serve.errors import ShipyardError
from serve.files import read_json
from serve.trust import MANIFEST

LEVEL = 19
MOST = 64 * 1024 * 1024
"""Largest archive, and largest dictionary, in bytes; a window of 2^26 covers both."""


def dictionary(bundle: Path) -> bytes:
    """Return the files of an installed bundle, one after the other in the order of their paths, bundle.json last."""
    names = sorted(entry["path"] for entry in read_json(bundle / MANIFEST)["files"])
    return b"".join((bundle / name).read_bytes() for name in (*names, MANIFEST))


def make_delta(base: Path, archive: bytes) -> bytes:
    """Return the patch from the bundle in `base` to an archive."""
    known = zstandard.ZstdCompressionDict(dictionary(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    # the window spans archive and dictionary, or what lies far behind could not be named
    log = min(27, max(20, (len(archive) + len(known.as_bytes())).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=log, enable_ldm=True, write_content_size=True, write_dict_id=False
    )
    return zstandard.ZstdCompressor(dict_data=known, compression_params=parameters).compress(archive)


def apply_delta(base: Path, patch: bytes, size: int) -> bytes:
    """Return the archive of `size` bytes that a patch makes of the bundle in `base`; its digest is for the caller to check.

    Raises:
        ShipyardError: it is no patch of this bundle, or makes something of another size.
    """
    try:
        told = zstandard.frame_content_size(patch)
        if told != size or size > MOST:
            raise ShipyardError("delta: another size", value=told, allowed=size)
        known = zstandard.ZstdCompressionDict(dictionary(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        return zstandard.ZstdDecompressor(dict_data=known, max_window_size=2**27).decompress(patch)
    except zstandard.ZstdError as fault:
        raise ShipyardError(f"delta: {fault}", mend="take the full archive") from None
