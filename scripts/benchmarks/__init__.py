"""What `bench.py` and its relatives measure with: backbones of T5's sizes, methods, rounds and figures."""
