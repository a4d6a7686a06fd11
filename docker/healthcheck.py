"""Says in one line whether this container can train: the package imports, and its kernels load.

    python /usr/local/bin/cce-healthcheck

Ends with status 1 and the reason otherwise. The images have a copy of docker/healthcheck.py there.
"""

from __future__ import annotations

import sys


def problem() -> str | None:
    """What does not work, or None."""
    try:
        import cce_torchrec
        from cce_torchrec.kmeans import native as kmeans
        from cce_torchrec.lookup import native as lookup

        _ = cce_torchrec.CCEEmbeddingBagConfig  # loads torch, FBGEMM and TorchRec
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    kernels = {"kmeans": kmeans.available(), "lookup": lookup.available()}
    missing = ", ".join(name for name, there in kernels.items() if not there)
    return f"no compiled kernels: {missing}" if missing else None


if __name__ == "__main__":
    if (found := problem()) is not None:
        sys.exit(f"unhealthy: {found}")
    print("healthy")
