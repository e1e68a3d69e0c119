"""Archive: a folder as .tar.gz, reproducible to the byte."""

import gzip
import tarfile
from pathlib import Path


def write_tar_gz(tree: Path, archive: Path) -> None:
    """Pack a folder to the same bytes everywhere: sorted names, one owner, one mode, no time.

    zlib decides how it packs: another version of it may write other bytes, of the same content.
    """
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as stream,
    ):
        for path in sorted(found for found in tree.rglob("*") if found.is_file()):
            entry = tarfile.TarInfo(path.relative_to(tree).as_posix())
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                stream.addfile(entry, content)
