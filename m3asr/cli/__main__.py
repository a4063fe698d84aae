"""`python -m m3asr.cli` is `m3asr`."""

from m3asr.cli import main

main()
