"""The sandbox that runs programs: its host, the isolation inside, the judge."""
