"""What these tests import by this name; it lives where the tests of the cluster find it too."""

from projects import COPIED, LOGS, STUDY, Outcome, Project, make_project

__all__ = ["COPIED", "LOGS", "STUDY", "Outcome", "Project", "make_project"]
