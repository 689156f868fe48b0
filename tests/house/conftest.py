from tests.distributed.conftest import finish, start  # noqa: F401  the fixtures that start ranks
