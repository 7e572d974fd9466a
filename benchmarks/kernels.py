"""`optimum-cli nm benchmark kernels` from a checkout; takes the same options."""

import sys

from optimum_nm.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["benchmark", "kernels"]
    main()
