"""Several processes that train together: python -m ranks RANK RANKS FOLDER CASE...; results into FOLDER.

test_sharding.py starts them and compares what they leave with one process that does the same (`lab.reference`).
"""
