"""`python -m compiler` is `trimtab`."""

from compiler.cli import main

main()
