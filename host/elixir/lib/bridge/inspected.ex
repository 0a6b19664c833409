defmodule Bridge.Inspected do
  @moduledoc """
  What Python says of a function, class, module or instance: from `Bridge.inspect_object/2`.

  `kind` is `"function"`, `"class"`, `"module"`, `"instance"` or `"value"`. `parameters` and `members` are lists of maps with
  strings for keys, as the protocol has them: `name`, `kind`, `annotation`, `default`; `name`, `kind`, `signature`,
  `summary`, `parameters`.
  """

  defstruct [:name, :kind, :module, :signature, :returns, :source_file, doc: "", parameters: [], members: []]

  @type t :: %__MODULE__{
          name: String.t(),
          kind: String.t(),
          module: String.t() | nil,
          signature: String.t() | nil,
          returns: String.t() | nil,
          source_file: String.t() | nil,
          doc: String.t(),
          parameters: [map()],
          members: [map()]
        }

  @doc false
  @spec new(map()) :: t()
  def new(result) do
    %__MODULE__{
      name: result["name"],
      kind: result["kind"],
      module: result["module"],
      signature: result["signature"],
      returns: result["returns"],
      source_file: result["source_file"],
      doc: result["doc"] || "",
      parameters: result["parameters"] || [],
      members: result["members"] || []
    }
  end

  defimpl Inspect do
    def inspect(it, _opts) do
      doc = it.doc |> String.trim() |> String.split("\n\n") |> hd() |> indented()
      members = for member <- it.members, do: "  #{member["name"]}#{member["signature"]}#{summary(member["summary"])}"
      head = "#Bridge.Inspected<#{it.kind} #{it.name}#{it.signature}"

      Enum.join(
        [head | if(doc == "", do: [], else: ["", doc])] ++ if(members == [], do: [], else: ["" | members]),
        "\n"
      ) <> ">"
    end

    defp indented(""), do: ""
    defp indented(text), do: "  " <> String.replace(text, "\n", "\n  ")
    defp summary(none) when none in [nil, ""], do: ""
    defp summary(text), do: "  # " <> text
  end
end
