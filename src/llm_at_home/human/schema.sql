-- One study. Grades are only ever added: a rater's last row for a position counts.
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE model (
  model INTEGER PRIMARY KEY,
  label TEXT NOT NULL UNIQUE,
  described TEXT NOT NULL -- JSON
) STRICT;
CREATE TABLE question (
  question_id INTEGER PRIMARY KEY,
  place INTEGER NOT NULL UNIQUE,
  category TEXT NOT NULL,
  turns TEXT NOT NULL -- JSON
) STRICT;
CREATE TABLE answer (
  answer INTEGER PRIMARY KEY,
  question_id INTEGER NOT NULL REFERENCES question,
  model INTEGER NOT NULL REFERENCES model,
  turns TEXT NOT NULL, -- JSON
  UNIQUE (question_id, model)
) STRICT;
CREATE TABLE item ( -- the order in which a rater sees the answers
  rater INTEGER NOT NULL,
  position INTEGER NOT NULL,
  answer INTEGER NOT NULL REFERENCES answer,
  question_number INTEGER NOT NULL,
  answer_number INTEGER NOT NULL,
  PRIMARY KEY (rater, position),
  UNIQUE (rater, answer)
) STRICT;
CREATE TABLE grade (
  entry INTEGER PRIMARY KEY AUTOINCREMENT,
  rater INTEGER NOT NULL,
  position INTEGER NOT NULL,
  grade INTEGER CHECK (grade BETWEEN 1 AND 5), -- null: a comment alone
  comment TEXT NOT NULL,
  graded_at TEXT NOT NULL, -- UTC, ISO 8601
  FOREIGN KEY (rater, position) REFERENCES item
) STRICT;
CREATE INDEX grade_of_item ON grade (rater, position, entry);
CREATE VIEW last_grade AS
  SELECT * FROM grade AS one
  WHERE entry = (SELECT max(entry) FROM grade WHERE rater = one.rater AND position = one.position);
