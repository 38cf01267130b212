"""Data sets that Hugging Face's `datasets` library reads: of the Hub, and local parquet, JSON, CSV, Arrow, imagefolder
and webdataset files.

    --source datasets --input FILE_OR_FOLDER          or          --source datasets --options hub=OWNER/NAME

Rows are streamed, so nothing is converted into the library's own cache, and images stay the bytes that they are. Which
column is what is said by options: `question`, `answer`, `choices`, `hint`, `category`, `id` and `image`, or `chat` for
a column of conversations (OpenAI's roles and content parts, or ShareGPT's `from` and `value`). `json.question` is the
field `question` of the column `json`. Columns that are called `question`, `answer`, `messages` or `conversations`,
`image` or `images` are found without; what is read, and what is not, is printed.

Trade-offs: where the data set has no split for validation, samples are held out by image, for which every row is read
twice; a JSON file that is one list is read into memory by the library, JSON Lines are not.

Nothing in a data set is executed: the library refuses scripts, and formats that can hold pickles are refused here.
"""

from data_prep.sources.streamed.read import read as read
