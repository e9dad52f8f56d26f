"""Does a dataset hold what its build promised, and what does it hold?"""
