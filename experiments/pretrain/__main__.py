import tyro

from .config import Config
from .run import main

if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
