"""What `dept_vl` offers to Python programs; everything else may change without notice."""
