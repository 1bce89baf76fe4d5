"""What bench/learning.py is made of: runs, their settings and images, training, the search, tables and plots."""
