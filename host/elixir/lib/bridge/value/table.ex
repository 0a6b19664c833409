defmodule Bridge.Table do
  @moduledoc """
  A table of pyarrow, polars or pandas: one Arrow IPC stream, which goes back to Python as what it was.

  `data` is the stream. With Explorer: `Explorer.DataFrame.load_ipc_stream!(table.data)`; and back:
  `%Bridge.Table{library: "polars", data: Explorer.DataFrame.dump_ipc_stream!(frame)}`. `type` is `"Series"` or
  `"RecordBatch"` if it is one; `name` is a pandas series's, `freq` the frequency of a pandas index.
  """

  @enforce_keys [:library, :data]
  defstruct [:library, :data, :type, :name, :freq]

  @type t :: %__MODULE__{
          library: String.t(),
          data: binary(),
          type: String.t() | nil,
          name: String.t() | nil,
          freq: String.t() | nil
        }

  defimpl Inspect do
    def inspect(%{library: library, data: data} = table, _opts) when is_binary(data) do
      type = if table.type, do: " " <> table.type, else: ""
      name = if table.name, do: " " <> Kernel.inspect(table.name), else: ""
      "#Bridge.Table<#{library}#{type}#{name}, #{Bridge.Bytes.size_text(byte_size(data))}>"
    end

    def inspect(table, opts), do: Inspect.Any.inspect(table, opts)
  end
end
