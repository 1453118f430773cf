"""What the extra ``fjax[lm]`` brings, asked for before anything that needs it."""

from fjax._optional import import_optional

import_optional("flax", extra="lm")
