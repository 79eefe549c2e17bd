"""`python -m minift.course` is `minift-course`."""

from minift.course.cli import main

if __name__ == "__main__":
    main()
