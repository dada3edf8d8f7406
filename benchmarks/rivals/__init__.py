"""What the benchmarks compare with: a stock Flower app, a script for pfl, and files that are added to our app."""
