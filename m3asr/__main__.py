"""`python -m m3asr` is `m3asr`."""

from m3asr.cli import main

main()
