// Makes the extension a Python module, which is how kernel-builder loads it; csrc/registration.cpp has the operators.
#include "registration.h"  // kernel-builder writes it

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
