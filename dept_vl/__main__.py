"""`python -m dept_vl` is the `dept-vl` command."""

from dept_vl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
