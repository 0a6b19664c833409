defmodule Bridge.Session do
  @moduledoc """
  A session by its id, and the bridge that owns it: what `Bridge.session/2` gives, and every function takes.

  It is a name, not a process, and it may be kept, sent and compared. What the session owns is in `Bridge.SessionStore`.
  """

  alias Bridge.{Config, Error, SessionStore}

  @enforce_keys [:id]
  defstruct [:id, bridge: Bridge]

  @type t :: %__MODULE__{id: String.t(), bridge: atom()}

  @doc false
  # The configuration and the id that a session, or an id with `bridge:`, stands for.
  @spec locate(t() | String.t() | nil, keyword()) :: {:ok, Config.t(), String.t()} | {:error, Error.t()}
  def locate(nil, opts), do: locate("default", opts)
  def locate(session, opts), do: SessionStore.target(session, opts)

  @doc false
  # Which bridge it is of, and its id.
  @spec whose(t() | String.t() | term(), keyword()) :: {:ok, atom(), term()} | {:error, Error.t()}
  def whose(%__MODULE__{bridge: bridge, id: id}, opts) do
    case Keyword.get(opts, :bridge, bridge) do
      ^bridge ->
        {:ok, bridge, id}

      other ->
        Error.error(:invalid_params, "session #{inspect(id)} is one of #{inspect(bridge)}, not of #{inspect(other)}",
          remedy: "Leave bridge: out, or take the session of that id there: Bridge.session(id, bridge: …)."
        )
    end
  end

  def whose(id, opts), do: {:ok, Keyword.get(opts, :bridge, Bridge), id}

  defimpl Inspect do
    def inspect(session, _opts) do
      on = if session.bridge == Bridge, do: "", else: " of #{Kernel.inspect(session.bridge)}"

      case Bridge.SessionStore.describe(session) do
        {:ok, known} ->
          holds =
            for {what, one} <- [variables: "variable", instances: "instance", functions: "function"],
                count = known[what],
                count > 0,
                do: "#{count} #{one}#{if count > 1, do: "s"}"

          "#Bridge.Session<#{session.id}#{on}#{Enum.map_join(holds, &", #{&1}")}>"

        {:error, error} ->
          "#Bridge.Session<#{session.id}#{on}, #{error.name}>"
      end
    end
  end
end
