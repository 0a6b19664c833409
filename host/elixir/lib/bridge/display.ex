defmodule Bridge.Display do
  @moduledoc """
  What code in a kernel displayed: a table, an image, a plot, by media types.

      iex> display = Bridge.Display.new(%{"data" => %{"text/plain" => "<Figure>", "image/png" => "iVBORw0KGgo="}})
      iex> display
      #Bridge.Display<image/png, text/plain
      <Figure>>
      iex> Bridge.Display.image(display)
      {:ok, "image/png", <<0x89, "PNG\\r\\n", 0x1A, "\\n">>}

  In Livebook it shows itself. `Bridge.Live.display/1` shows it beneath the current cell, also where Kino's protocols were
  consolidated before Bridge was there.
  """

  alias Bridge.Live.Kino, as: Seam

  defstruct data: %{}, metadata: %{}, display_id: nil, update: false

  @typedoc """
  `data` has texts, images as Base64, JSON decoded; `display_id` says in whose place it is shown if it is an `update`.
  """
  @type t :: %__MODULE__{
          data: %{String.t() => term()},
          metadata: map(),
          display_id: String.t() | nil,
          update: boolean()
        }

  @images ["image/png", "image/jpeg", "image/gif", "image/webp"]
  @order ["text/html", "image/svg+xml"] ++ @images ++ ["text/markdown", "text/latex", "text/plain"]
  @telemetry "application/vnd.bridge.telemetry.v1+json"

  @doc "From the content of a `display_data`, `update_display_data` or `execute_result` message."
  @spec new(map(), keyword()) :: t()
  def new(%{"data" => %{} = data} = content, opts \\ []) do
    data = for {mime, value} <- data, is_binary(mime), into: %{}, do: {mime, joined(value)}
    id = with %{"transient" => %{"display_id" => id}} <- content, do: id

    %__MODULE__{
      data: data,
      metadata: if(is_map(content["metadata"]), do: content["metadata"], else: %{}),
      display_id: if(is_binary(id), do: id),
      update: Keyword.get(opts, :update, false)
    }
  end

  # Jupyter's formats allow a list of lines for a text.
  defp joined(value) when is_list(value) do
    if Enum.all?(value, &is_binary/1), do: Enum.join(value), else: value
  end

  defp joined(value), do: value

  @doc "The batches of events, if it is a kernel's telemetry."
  @spec telemetry(t()) :: {:ok, list()} | :error
  def telemetry(%__MODULE__{data: %{@telemetry => batches}}) when is_list(batches), do: {:ok, batches}
  def telemetry(%__MODULE__{}), do: :error

  @doc "The image it has, with its media type, decoded."
  @spec image(t()) :: {:ok, String.t(), binary()} | :error
  def image(%__MODULE__{data: data}) do
    Enum.find_value(@images, :error, fn mime ->
      with text when is_binary(text) <- data[mime],
           {:ok, bytes} <- Base.decode64(text, ignore: :whitespace) do
        {:ok, mime, bytes}
      else
        _none -> nil
      end
    end)
  end

  @doc "The plain text it has; of one without any, what it is."
  @spec text(t()) :: String.t()
  def text(%__MODULE__{data: data}) do
    case data do
      %{"text/plain" => text} when is_binary(text) -> text
      %{"text/markdown" => text} when is_binary(text) -> text
      _other -> ""
    end
  end

  @doc "What Kino shows of it: the richest there is. Needs Kino."
  @spec to_kino(t()) :: term()
  def to_kino(%__MODULE__{data: data} = display) do
    case Enum.find(@order, &is_binary(data[&1])) do
      "text/html" -> Seam.html(data["text/html"])
      "image/svg+xml" -> Seam.image(data["image/svg+xml"], "image/svg+xml")
      "text/markdown" -> Seam.markdown(data["text/markdown"])
      "text/latex" -> Seam.markdown("$$" <> String.trim(data["text/latex"], "$") <> "$$")
      mime when mime in @images -> pictured(display)
      _plain -> Seam.text(shown(display))
    end
  end

  defp pictured(display) do
    case image(display) do
      {:ok, mime, bytes} -> Seam.image(bytes, mime)
      :error -> Seam.text(shown(display))
    end
  end

  defp shown(display), do: if(text(display) == "", do: inspect(display), else: text(display))

  @doc false
  # Kino's protocol cannot be implemented when this is compiled: Kino may not be there, or be compiled later. It is when
  # a bridge starts; where protocols are consolidated already there is `Bridge.Live.display/1`.
  @spec implement_render() :: :ok
  def implement_render do
    there? = Code.ensure_loaded?(Kino.Render) and not Protocol.consolidated?(Kino.Render)

    if there? and not Code.ensure_loaded?(Module.concat(Kino.Render, __MODULE__)) do
      implementation =
        quote do
          defimpl Kino.Render, for: Bridge.Display do
            def to_livebook(display), do: Kino.Render.to_livebook(Bridge.Display.to_kino(display))
          end
        end

      Code.eval_quoted(implementation, [], __ENV__)
    end

    :ok
  end

  defimpl Inspect do
    @max 4_000

    def inspect(display, _opts) do
      mimes = display.data |> Map.keys() |> Enum.sort() |> Enum.join(", ")
      text = Bridge.Display.text(display)
      text = if String.length(text) > @max, do: String.slice(text, 0, @max) <> "…", else: text
      "#Bridge.Display<" <> mimes <> if(text == "", do: ">", else: "\n" <> text <> ">")
    end
  end
end
