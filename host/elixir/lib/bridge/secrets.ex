defmodule Bridge.Secrets do
  @moduledoc """
  A session's API keys and the like: sealed wherever they are kept, and never shown.

      :ok = Bridge.Secrets.put("demo", "OPENAI_API_KEY", System.fetch_env!("OPENAI_API_KEY"))
      {:ok, ["OPENAI_API_KEY"]} = Bridge.Secrets.list("demo")

  A command gets those that it names: `Bridge.call(session, function, args, secrets: ["OPENAI_API_KEY"])`. Nobody else
  can read one. They are sealed with AES-256-GCM, in memory and on disk; the key is in the file `secrets.key` of the store's
  directory, which only its owner can read, or in memory if there is no store.
  """

  alias Bridge.{Error, SessionStore}
  alias Bridge.Store.{Commit, Owner, Plain, Tables, Vault}

  @lm_key "lm.api_key"

  @doc "Keeps a secret, a string that is not empty, under that name."
  @spec put(SessionStore.session(), SessionStore.name(), String.t(), keyword()) :: :ok | {:error, Error.t()}
  def put(session, name, value, opts \\ []) do
    with {:ok, cfg, id} <- SessionStore.asked(session, opts),
         {:ok, name} <- name(name),
         :ok <- check(value) do
      put_as(cfg, id, name, value)
    end
  end

  @doc "Whether there is one of that name."
  @spec has?(SessionStore.session(), SessionStore.name(), keyword()) :: boolean()
  def has?(session, name, opts \\ []) do
    case list(session, opts) do
      {:ok, names} -> to_string(name) in names
      {:error, _error} -> false
    end
  end

  @doc "The names of the session's secrets."
  @spec list(SessionStore.session(), keyword()) :: {:ok, [String.t()]} | {:error, Error.t()}
  def list(session, opts \\ []) do
    with {:ok, cfg, id} <- SessionStore.asked(session, opts) do
      SessionStore.reading(cfg, fn tables ->
        with {:ok, _session} <- Commit.session(tables, id), do: {:ok, Tables.names(tables, :secret, id) -- [@lm_key]}
      end)
    end
  end

  @doc "Forgets a secret; `:not_found` if there is none of that name."
  @spec delete(SessionStore.session(), SessionStore.name(), keyword()) :: :ok | {:error, Error.t()}
  def delete(session, name, opts \\ []) do
    with {:ok, cfg, id} <- SessionStore.asked(session, opts), {:ok, name} <- name(name), do: delete_as(cfg, id, name)
  end

  @doc false
  # Clear text, for a command that named them: by name.
  @spec for_command(struct(), String.t(), [String.t()]) :: {:ok, %{String.t() => String.t()}} | {:error, Error.t()}
  def for_command(_cfg, _session, []), do: {:ok, %{}}

  def for_command(cfg, session, names) do
    Owner.call(
      cfg,
      {:with_vault,
       fn vault, tables ->
         one = fn name -> with {:ok, clear} <- clear(vault, tables, session, name), do: {:ok, {name, clear}} end
         with {:ok, pairs} <- Bridge.Result.map(names, one), do: {:ok, Map.new(pairs)}
       end}
    )
  end

  defp clear(vault, tables, session, name) do
    with {:ok, sealed} <- sealed(tables, session, name) do
      Vault.unseal(vault, sealed, place(session, name), "the secret #{inspect(name)}")
    end
  end

  @doc false
  # All that must be shown nowhere, however a kernel came by it; of those that cannot be unsealed none has. It is asked for
  # each batch of telemetry: the store's owner unseals them once, until one is set or deleted. They are kept in a function,
  # which neither inspect nor Observer opens, in an ETS table, which no crash dump has.
  @spec all(struct(), String.t()) :: [String.t()]
  def all(cfg, session) do
    known =
      SessionStore.reading(cfg, fn tables ->
        with :error <- Tables.clear(tables, session),
             [_ | _] <- Tables.names(tables, :secret, session),
             do: Owner.call(cfg, {:with_vault, &unsealed(&1, &2, session)})
      end)

    case known do
      {:ok, secrets} -> secrets.()
      _none -> []
    end
  end

  defp unsealed(vault, tables, session) do
    names = Tables.names(tables, :secret, session)
    clear = for name <- names, {:ok, clear} <- [clear(vault, tables, session, name)], do: clear
    secrets = fn -> clear end
    # The key may be put back where it was, and they be given to a command.
    if length(clear) == length(names), do: Tables.keep_clear(tables, session, secrets)
    {:ok, secrets}
  end

  @doc false
  # The key of the session's language model, nil if it has none.
  @spec lm_key(struct(), String.t()) :: {:ok, String.t() | nil} | {:error, Error.t()}
  def lm_key(cfg, session) do
    case Tables.get(SessionStore.tables!(cfg), :secret, session, @lm_key) do
      {:ok, _sealed} -> with {:ok, %{@lm_key => key}} <- for_command(cfg, session, [@lm_key]), do: {:ok, key}
      :error -> {:ok, nil}
    end
  end

  @doc false
  @spec put_lm_key(struct(), String.t(), String.t() | nil) :: :ok | {:error, Error.t()}
  def put_lm_key(cfg, session, nil) do
    case Tables.get(SessionStore.tables!(cfg), :secret, session, @lm_key) do
      {:ok, _sealed} -> delete_as(cfg, session, @lm_key)
      :error -> :ok
    end
  end

  def put_lm_key(cfg, session, key), do: with(:ok <- check(key), do: put_as(cfg, session, @lm_key, key))

  # In a function, for what is sent to a process may be shown by its crash report.
  defp put_as(cfg, id, name, value) do
    clear = fn -> value end

    Owner.call(
      cfg,
      {:change, id, true,
       fn at ->
         more = if Tables.get(at.tables, :secret, at.id, name) == :error, do: 1, else: 0

         with :ok <- Commit.check_quota(at.quota, at.session, %{more: more, new: 0, bytes: 0}),
              {:ok, sealed} <- Vault.seal(at.vault, clear.(), place(at.id, name)) do
           {:ok, [{:secret, at.id, name, sealed}], :ok}
         end
       end}
    )
  end

  defp delete_as(cfg, id, name) do
    Owner.call(
      cfg,
      {:change, id, false,
       fn at ->
         with {:ok, _sealed} <- sealed(at.tables, at.id, name), do: {:ok, [{:secret_gone, at.id, name}], :ok}
       end}
    )
  end

  defp sealed(tables, session, name) do
    with :error <- Tables.get(tables, :secret, session, name) do
      Commit.missing(session, "secret", name, Tables.names(tables, :secret, session) -- [@lm_key])
    end
  end

  # What a secret is sealed for. A name may hold any character: the session's length says where it begins.
  defp place(session, name), do: "secret:#{byte_size(session)}:#{session}:#{name}"

  defp name(name) do
    name = if is_atom(name) and name != nil, do: Atom.to_string(name), else: name

    with :ok <- Plain.check_name("secret", name) do
      if name == @lm_key do
        Error.error(:invalid_params, "#{inspect(name)} is set with the session's language model")
      else
        {:ok, name}
      end
    end
  end

  defp check(value) do
    if is_binary(value) and value != "" and String.valid?(value) do
      :ok
    else
      # Not shown: it is to be a secret.
      Error.error(:invalid_params, "a secret is a string that is not empty")
    end
  end
end
