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

  @texts ["name", "kind"]
  @perhaps ["module", "signature", "returns", "source_file", "doc"]

  @doc false
  # From a kernel's answer; `:error` if it is none.
  @spec read(map()) :: {:ok, t()} | :error
  def read(result) do
    texts? = Enum.all?(@texts, &is_binary(result[&1])) and Enum.all?(@perhaps, &text?(result[&1]))

    if texts? and list?(result["parameters"]) and list?(result["members"]), do: {:ok, new(result)}, else: :error
  end

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

  defp text?(text), do: text == nil or is_binary(text)
  defp list?(nil), do: true

  defp list?(list) do
    is_list(list) and
      Enum.all?(list, &match?(%{"name" => name} when is_binary(name), &1)) and
      Enum.all?(list, &(text?(&1["signature"]) and text?(&1["summary"])))
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
