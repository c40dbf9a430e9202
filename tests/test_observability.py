"""What a manager says of itself: metrics for a scraper, snapshots and their pictures, and what its page says."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
