"""Hard use: random programs, damaged files, kills, bad disks and clocks, and a long soak."""
