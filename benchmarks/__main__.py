import sys

from benchmarks.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
